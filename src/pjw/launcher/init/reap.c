/* The life of a job: waits for output, signals, children and time; ends everything when the command ends. */
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The kernel tells nobody when space is freed, so this one thing has to be tried from time to time. */
enum { HELD_RETRY_MS = 250 };

struct job {
    struct output *output;
    int signals, timer;
    pid_t command;
    enum flow flow;
    bool ended, killed_after_end;
    struct ending ending;
};

/*
 * PID 1 of a namespace is never sent a signal that it leaves at its default, but a blocked signal is always
 * kept, because its disposition may change before it is unblocked. So blocked signals do reach a signalfd.
 * main() blocked these before the clone: there is no moment at which one is lost.
 */
int open_signals(void) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGQUIT);
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (fd < 0)
        fail(STEP_SIGNALFD, NULL);
    return fd;
}

/* CLOCK_BOOTTIME: wall-clock time, a suspended machine's too, which no change of the date moves. */
int open_timer(uint64_t seconds) {
    struct itimerspec when = {.it_value.tv_sec = (time_t)seconds};
    int fd = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK);
    if (fd < 0 || timerfd_settime(fd, 0, &when, NULL) < 0)
        fail(STEP_TIMER, NULL);
    return fd;
}

/* The first cause is the reason. kill(2) of -1 is every process of our namespace but ourselves, at once. */
static void end_all(struct job *job, enum reason reason, int signal) {
    if (job->ending.reason == REASON_NONE)
        job->ending.reason = reason;
    kill(-1, signal);
    if (signal != SIGKILL)
        kill(-1, SIGCONT); /* a stopped process would not see it */
}

/* Gives whether children are left. */
static bool reap(struct job *job, int options) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, __WALL | options)) > 0 || (pid < 0 && errno == EINTR)) {
        if (pid > 0 && WIFSTOPPED(status)) {
            /* It asked its parent to trace it (PTRACE_TRACEME), and that is us: let it go on untraced. */
            int number = WSTOPSIG(status);
            ptrace(PTRACE_DETACH, pid, NULL, (void *)(intptr_t)(number == SIGTRAP ? 0 : number));
            continue;
        }
        if (pid != job->command || job->ended)
            continue;
        job->ended = true;
        job->ending.wait_status = status;
        job->ending.ended_ns = realtime_ns();
    }
    return pid == 0;
}

static void read_signals(struct job *job) {
    struct signalfd_siginfo info;
    while (read(job->signals, &info, sizeof info) == sizeof info) {
        if (info.ssi_signo == SIGCHLD)
            reap(job, WNOHANG);
        else if (job->ended)
            job->killed_after_end |= info.ssi_signo == SIGQUIT;
        else
            end_all(job, REASON_STOPPED, info.ssi_signo == SIGQUIT ? SIGKILL : SIGTERM);
    }
}

/* Wait for whatever is next. How the output stands says which of its two ends we wait for, if any. */
static void await(struct job *job) {
    const struct output *output = job->output;
    bool readable = job->flow == FLOW_MORE || job->flow == FLOW_EMPTY, full = job->flow == FLOW_FULL;
    struct pollfd fds[] = {
        {.fd = job->signals, .events = POLLIN},
        {.fd = job->timer, .events = POLLIN},
        {.fd = readable ? output->pipe : full ? output->file : -1, .events = readable ? POLLIN : POLLOUT},
    };
    if (poll(fds, sizeof fds / sizeof *fds, job->flow == FLOW_HELD ? HELD_RETRY_MS : -1) < 0)
        return;
    if (fds[2].revents || job->flow == FLOW_HELD)
        job->flow = move_output(job->output);
    if (fds[0].revents)
        read_signals(job);
    if (fds[1].revents) {
        job->timer = -1; /* it stays readable: a process that is slow to die must not make us spin */
        if (!job->ended)
            end_all(job, REASON_TIMED_OUT, SIGKILL);
    }
}

static void run_command(struct job *job) {
    while (!job->ended) {
        enum flow before = job->flow;
        await(job);
        if (job->flow == before)
            continue;
        if (job->flow == FLOW_OVER && !job->ended)
            end_all(job, REASON_OUTPUT_LIMIT, SIGKILL);
        else if (job->flow == FLOW_END)
            close(job->output->pipe); /* nobody reads any more: a job that goes on writing gets SIGPIPE */
    }
}

/* All writers are dead: what is in the pipe is all there will ever be. Only a full disk can delay its end. */
static void drain(struct job *job) {
    if (job->flow == FLOW_EMPTY)
        job->flow = FLOW_MORE; /* it was empty when we last looked */
    for (;;) {
        if (job->flow == FLOW_MORE)
            job->flow = move_output(job->output);
        else if ((job->flow == FLOW_HELD || job->flow == FLOW_FULL) && !job->killed_after_end)
            await(job);
        else
            break;
    }
    if (job->flow == FLOW_OVER && job->ending.reason == REASON_NONE)
        job->ending.reason = REASON_OUTPUT_LIMIT;
}

struct ending run_job(struct output *output, int signals, int timer, pid_t command) {
    struct job job = {
        .output = output, .signals = signals, .timer = timer, .command = command, .flow = FLOW_EMPTY};
    run_command(&job);
    /* Orphans become our children at once, so without a child there is nobody left, and kill(2) of -1 need
     * not look through every process of the host. */
    if (reap(&job, WNOHANG)) {
        kill(-1, SIGKILL);
        /* Blocking, until there is none: they all have SIGKILL pending, so none waits for us to read. */
        reap(&job, 0);
    }
    drain(&job);
    return job.ending;
}
