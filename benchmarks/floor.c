/*
 * The kernel's floor under a start: clone into new namespaces, and exec; nothing that a launcher could leave out.
 *
 *     floor NAMESPACES COUNT COMMAND [ARGUMENT]...
 *
 * NAMESPACES: letters of p m n i u c (PID, mount, network, IPC, UTS, cgroup), or - for none. Prints a line for each
 * of COUNT runs, one after the other: the nanoseconds until the exec, and those until the end was known.
 */
#define _GNU_SOURCE
#include <err.h>
#include <inttypes.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t flags_of(const char *letters) {
    static const char names[] = "pmniuc";
    static const uint64_t flags[] = {
        CLONE_NEWPID, CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWIPC, CLONE_NEWUTS, CLONE_NEWCGROUP,
    };
    uint64_t sum = 0;
    for (const char *at = letters; *at; at++)
        if (strchr(names, *at))
            sum |= flags[strchr(names, *at) - names];
    return sum;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int main(int argc, char **argv) {
    if (argc < 4)
        errx(2, "usage: floor NAMESPACES COUNT COMMAND [ARGUMENT]...");
    /* CLONE_VFORK: we go on when the command has been executed. Without CLONE_VM the child has a stack of its own. */
    struct clone_args args = {.flags = flags_of(argv[1]) | CLONE_VFORK, .exit_signal = SIGCHLD};
    for (int left = atoi(argv[2]); left > 0; left--) {
        int64_t began = now_ns();
        long pid = syscall(SYS_clone3, &args, sizeof args);
        if (pid < 0)
            err(1, "clone3");
        if (pid == 0) {
            execv(argv[3], argv + 3);
            _exit(127);
        }
        int64_t executed = now_ns();
        int status;
        if (waitpid((pid_t)pid, &status, 0) != pid || status != 0)
            errx(1, "%s ended with status %#x", argv[3], (unsigned)status);
        printf("%" PRId64 " %" PRId64 "\n", executed - began, now_ns() - began);
    }
    return 0;
}
