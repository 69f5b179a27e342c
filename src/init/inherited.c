/*
 * Settings that survive an exec and would come from the process that started pjwd: init sets them anew, for itself and its
 * job. main.c sets signals, command.c the umask. The processors that pjwd may run on stay: so an operator keeps jobs off
 * the others.
 */
#include "init.h"

#include <errno.h>
#include <sched.h>
#include <sys/personality.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

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
