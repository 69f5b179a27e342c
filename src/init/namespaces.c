/* The job's cgroup and namespaces. */
#include "init.h"

#include <errno.h>
#include <linux/sched.h>
#include <net/if.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_clone3
#define SYS_clone3 435
#endif
enum { KEYCTL_JOIN_SESSION_KEYRING = 1 }; /* from linux/keyctl.h, which not every libc-dev has */

int clone_into_cgroup(struct clone_args *args, const struct options *options) {
    if (options->cgroup_fd >= 0) {
        args->flags |= CLONE_INTO_CGROUP;
        args->cgroup = (uint64_t)options->cgroup_fd;
    }
    /* a fork to libc: no shared memory, and we call nothing that asks it for our thread id */
    return (int)syscall(SYS_clone3, args, sizeof *args);
}

/*
 * With a launcher to report to, init becomes the launcher's own child (CLONE_PARENT; exit_signal must be 0 then and is
 * inherited): whatever becomes of the spawner, its end is seen and collected. By hand it is ours to wait for.
 */
int clone_init(const struct options *options, int *pidfd) {
    bool reported = options->report_fd >= 0;
    struct clone_args args = {
        .flags = CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_PIDFD,
        .pidfd = (uintptr_t)pidfd,
        .exit_signal = reported ? 0 : SIGCHLD,
    };
    if (reported)
        args.flags |= CLONE_PARENT;
    return clone_into_cgroup(&args, options);
}

/*
 * cgroup v1 has no CLONE_INTO_CGROUP. init enters by itself, before anything else, and not the first stage
 * before the clone: that is no process of the job, and would count in its pids. By a file `tasks`, or `cgroup.procs`: the
 * former takes one thread, and we have no other.
 */
int enter_cgroups(const struct options *options) {
    for (int i = 0; i < options->cgroup_procs_count; i++) {
        if (write(options->cgroup_procs_fds[i], "0", 1) != 1)
            return errno;
        close(options->cgroup_procs_fds[i]);
    }
    if (options->cgroup_fd >= 0)
        close(options->cgroup_fd);
    return 0;
}

static void bring_up_loopback(void) {
    struct ifreq request = {.ifr_flags = IFF_UP};
    strcpy(request.ifr_name, "lo");
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        fail(STEP_LOOPBACK, NULL);
    close(fd);
}

/* Keyrings are in no namespace: without this the job would possess the launcher's session keyring. */
void join_keyring(void) {
    if (syscall(SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, NULL) < 0 && errno != ENOSYS && errno != EPERM)
        fail(STEP_KEYRING, NULL);
}

void enter_namespaces(const struct options *options) {
    /* Not in the clone3: there the new namespace would be rooted in our parent's cgroup. */
    if (unshare(CLONE_NEWCGROUP) < 0)
        fail(STEP_CGROUP_NS, NULL);
    join_keyring();
    if (options->hostname && sethostname(options->hostname, strlen(options->hostname)) < 0)
        fail(STEP_HOSTNAME, NULL);
    bring_up_loopback();
}
