/* Giving up privilege: all of it for the command, all but CAP_KILL for init. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

int set_oom_score_adj(const char *value) {
    int fd = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t written = write(fd, value, strlen(value));
    int error = errno;
    close(fd);
    errno = error;
    return written < 0 ? -1 : 0;
}

static int set_capabilities(uint32_t effective, uint32_t permitted) {
    struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
    struct __user_cap_data_struct data[2] = {{.effective = effective, .permitted = permitted}};
    return (int)syscall(SYS_capset, &header, data);
}

/* The capabilities that become_user() takes. */
static const uint32_t TO_BECOME_ANOTHER = 1U << CAP_KILL | 1U << CAP_SETUID | 1U << CAP_SETGID | 1U << CAP_SETPCAP;

/* The bounding set only matters to an exec, and init never does one: this is for the command, see below. */
void bound_to_kill(void) {
    for (int capability = 0; capability < 64; capability++) {
        if (capability == CAP_KILL || prctl(PR_CAPBSET_DROP, capability) == 0)
            continue;
        if (errno == EINVAL) /* beyond the last one that this kernel knows */
            return;
        fail(STEP_BOUNDING_SET, NULL);
    }
}

/*
 * init stays uid 0, so that the job, of another uid, can neither signal nor trace it, and keeps CAP_KILL,
 * because a root without it may not signal the job either. Not dumpable: the files of /proc/1 belong to root.
 * Towards file systems it is the owner of the output file, so that job output cannot eat the blocks reserved
 * for root.
 */
void keep_only_kill(uid_t output_owner, bool starts_another) {
    setfsuid(output_owner);
    uint32_t kill = 1U << CAP_KILL;
    if (set_capabilities(kill, starts_another ? TO_BECOME_ANOTHER : kill) < 0 || prctl(PR_SET_DUMPABLE, 0) < 0)
        fail(STEP_CAPABILITIES, NULL);
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        fail(STEP_NO_NEW_PRIVS, NULL);
}

/* The fsuid as well: oom_score_adj of an undumpable process is root's. */
void take_back(void) {
    setfsuid(0);
    if (set_capabilities(TO_BECOME_ANOTHER, TO_BECOME_ANOTHER) < 0)
        fail(STEP_CAPABILITIES, NULL);
}

/*
 * Raw system calls for the ids: libc's wrappers would have every thread of the process change, which a child
 * of vfork(2) must not ask for. The change of uid makes the memory that we share with init until the exec
 * undumpable, so no process of the same uid elsewhere can trace us in between.
 */
enum step become_user(uid_t uid, gid_t gid) {
    if (prctl(PR_CAPBSET_DROP, CAP_KILL) < 0)
        return STEP_BOUNDING_SET;
    if (syscall(SYS_setgroups, 0, NULL) < 0)
        return STEP_GROUPS;
    if (syscall(SYS_setresgid, gid, gid, gid) < 0)
        return STEP_GID;
    if (syscall(SYS_setresuid, uid, uid, uid) < 0)
        return STEP_UID;
    /* setresuid(2) has emptied the permitted set, but an inherited "inheritable" set would have survived */
    if (set_capabilities(0, 0) < 0 || prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0)
        return STEP_CAPABILITIES;
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
        return STEP_NO_NEW_PRIVS;
    return STEP_NONE;
}

/*
 * Settings that survive an exec and would come from the process that started pjwd: init sets them anew, for itself and its
 * job. main.c sets signals, command.c the umask. The processors that pjwd may run on stay: so an operator keeps jobs off
 * the others.
 */

/*
 * Init lifts limits on resources that the cgroup limits, and limits that were meant for the operator's own processes.
 * Processes above all: Linux counts them by user, so one job's would be taken from the client's other jobs. It bounds
 * memory of the kernel that older kernels do not count in a cgroup: pending signals, message queues, locked pages.
 * Descriptors are as systemd has them: few for a program that uses select(2), many for one that asks. Core files: 1 and not
 * 0. Where kernel.core_pattern names a program, the kernel starts it, as root and on the host, for every crash except those
 * of a process with a limit of exactly 1 (core(5)).
 */
#define NONE {RLIM_INFINITY, RLIM_INFINITY}
static const struct rlimit LIMITS[] = {
    [RLIMIT_AS] = NONE,
    [RLIMIT_CORE] = {1, 1},
    [RLIMIT_CPU] = NONE,
    [RLIMIT_DATA] = NONE,
    [RLIMIT_FSIZE] = NONE,
    [RLIMIT_LOCKS] = NONE,
    [RLIMIT_MEMLOCK] = {8 << 20, 8 << 20},
    [RLIMIT_MSGQUEUE] = {819200, 819200},
    [RLIMIT_NICE] = {0, 0},
    [RLIMIT_NOFILE] = {1024, 524288},
    [RLIMIT_NPROC] = NONE,
    [RLIMIT_RSS] = NONE,
    [RLIMIT_RTPRIO] = {0, 0},
    [RLIMIT_RTTIME] = NONE,
    [RLIMIT_SIGPENDING] = {65536, 65536},
    [RLIMIT_STACK] = {8 << 20, RLIM_INFINITY},
};
_Static_assert(sizeof LIMITS / sizeof *LIMITS == RLIM_NLIMITS, "a limit of this kernel's headers has no line");
enum { TIMER_SLACK_NS = 50000, IOPRIO_WHO_PROCESS = 1 };

/* Raising a hard limit takes CAP_SYS_RESOURCE, which a container may lack: then the old limit stays. */
static void set_limit(int resource) {
    struct rlimit limit = LIMITS[resource], now;
    if (setrlimit(resource, &limit) == 0)
        return;
    if (errno != EPERM || getrlimit(resource, &now) < 0)
        fail(STEP_LIMITS, NULL);
    limit.rlim_max = now.rlim_max;
    if (limit.rlim_cur > limit.rlim_max)
        limit.rlim_cur = limit.rlim_max;
    if (setrlimit(resource, &limit) < 0)
        fail(STEP_LIMITS, NULL);
}

/* Of these only raising a priority takes a capability, CAP_SYS_NICE: without it a job has pjwd's priority. */
static void set_scheduling(void) {
    sched_setscheduler(0, SCHED_OTHER, &(struct sched_param){0});
    setpriority(PRIO_PROCESS, 0, 0);
    syscall(SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, 0);
    prctl(PR_SET_TIMERSLACK, TIMER_SLACK_NS);
    personality(PER_LINUX);
}

void set_inherited(void) {
    for (int resource = 0; resource < RLIM_NLIMITS; resource++)
        set_limit(resource);
    set_scheduling();
}
