/*
 * The kernel's floor under a start: clone into new namespaces, and exec; nothing that a launcher could leave out.
 *
 *     floor LETTERS [CGROUP [FILE=VALUE]...]... -- COMMAND [ARGUMENT]...
 *
 * For each byte on stdin one run, and a line with the nanoseconds until the exec, and until the end was known.
 * LETTERS: namespaces (p m n i u c: PID, mount, network, IPC, UTS, cgroup); o: a start is not the exec, but the
 * first byte that the command writes to its stdout; - for none. CGROUP: the path of a directory that each run makes,
 * limits by writing VALUE into its FILE, enters before the exec, and removes before we print its end.
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
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

static void write_file(const char *directory, const char *name, int length, const char *value) {
    char path[512];
    snprintf(path, sizeof path, "%s/%.*s", directory, length, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, value, strlen(value)) < 0)
        err(1, "%s of %s", value, path);
    close(fd);
}

static int is_v2(const char *directory) {
    char path[512];
    snprintf(path, sizeof path, "%s/cgroup.type", directory);
    return access(path, F_OK) == 0;
}

/* Gives a descriptor for CLONE_INTO_CGROUP; -1 on v1, where a process enters one hierarchy after the other. */
static int make_cgroups(char **words) {
    int fd = -1;
    const char *directory = NULL;
    for (char **word = words; *word; word++) {
        const char *equals = strchr(*word, '=');
        if (**word != '/') {
            write_file(directory, *word, (int)(equals - *word), equals + 1);
            continue;
        }
        directory = *word;
        if (mkdir(directory, 0755) < 0)
            err(1, "%s", directory);
        if (is_v2(directory) && (fd = open(directory, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
            err(1, "%s", directory);
    }
    return fd;
}

static void remove_cgroups(char **words) {
    for (char **word = words; *word; word++)
        /* newer kernels may hold a process that was reaped in its cgroup for a moment */
        while (**word == '/' && rmdir(*word) < 0)
            if (errno != EBUSY || sched_yield() < 0)
                err(1, "%s", *word);
}

static _Noreturn void execute(char **cgroups, int entered, int output, char **argv) {
    for (char **word = cgroups; *word && entered < 0; word++)
        if (**word == '/')
            write_file(*word, "cgroup.procs", 12, "0");
    if (output >= 0)
        dup2(output, STDOUT_FILENO);
    execvp(argv[0], argv);
    err(127, "%s", argv[0]);
}

static void run(uint64_t flags, int told, char **cgroups, char **argv) {
    char byte;
    int status, output[2] = {-1, -1};
    if (told && pipe2(output, O_CLOEXEC) < 0)
        err(1, "pipe2");
    int64_t began = now_ns();
    int cgroup = make_cgroups(cgroups);
    /* CLONE_VFORK: we go on when the command has been executed. Without CLONE_VM the child has its own stack. */
    struct clone_args args = {.flags = flags | CLONE_VFORK, .exit_signal = SIGCHLD};
    if (cgroup >= 0) {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = (uint64_t)cgroup;
    }
    long pid = syscall(SYS_clone3, &args, sizeof args);
    if (pid < 0)
        err(1, "clone3");
    if (pid == 0)
        execute(cgroups, cgroup, output[1], argv);
    if (told) {
        close(output[1]);
        if (read(output[0], &byte, 1) != 1)
            errx(1, "%s ended without a byte of output", argv[0]);
    }
    int64_t started = now_ns();
    if (waitpid((pid_t)pid, &status, 0) != pid || status != 0)
        errx(1, "%s ended with status %#x", argv[0], (unsigned)status);
    remove_cgroups(cgroups);
    printf("%" PRId64 " %" PRId64 "\n", started - began, now_ns() - began);
    if (cgroup >= 0)
        close(cgroup);
    if (told)
        close(output[0]);
}

int main(int argc, char **argv) {
    int split = 2;
    while (split < argc && strcmp(argv[split], "--") != 0)
        split++;
    if (split + 1 >= argc)
        errx(2, "usage: floor LETTERS [CGROUP [FILE=VALUE]...]... -- COMMAND [ARGUMENT]...");
    argv[split] = NULL;
    setvbuf(stdout, NULL, _IOLBF, 0);
    while (getchar() != EOF)
        run(flags_of(argv[1]), strchr(argv[1], 'o') != NULL, argv + 2, argv + split + 1);
    return 0;
}
