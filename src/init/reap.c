/* The life of a job: waits for output, signals, children and time; ends everything when the command ends. */
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

/* The kernel does not tell when space is freed, so this one thing has to be tried from time to time. */
enum { HELD_RETRY_MS = 250 };

struct job {
    const struct options *options;
    struct outputs *outputs;
    struct input *input;
    struct control *control;
    int signals, timer;
    pid_t command;
    bool ended;
    bool entered; /* the job may have a process that is none of our children: one that makes a session */
    struct ending ending;
};

/*
 * PID 1 of a namespace is never sent a signal that it leaves at its default, but a blocked signal is always
 * kept, because its disposition may change before it is unblocked. So blocked signals do reach a signalfd.
 * main() blocked these before the clone: there is no moment at which one is lost.
 */
int open_signals(const struct options *options) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    if (!is_session(options)) {
        sigaddset(&set, SIGTERM);
        sigaddset(&set, SIGQUIT);
        sigaddset(&set, ENTERED);
        for (int number = SIGNAL_FIRST + 1; number <= SIGNAL_LAST; number++)
            sigaddset(&set, number);
    }
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

/*
 * SIGKILL, and lift the throttles of the job's disk IO: a process that waits in one sees no signal before that. The
 * kernel checked privilege when the launcher opened the files. A file or disk that is gone throttles nothing.
 */
static void kill_all(const struct options *options) {
    kill(-1, SIGKILL);
    for (int i = 0; i < options->lift_fds_count; i++)
        for (int disk = 0; disk < options->lifts_count; disk++)
            if (write(options->lift_fds[i], options->lifts[disk], strlen(options->lifts[disk])) < 0)
                continue;
}

static void end_group(pid_t group, int signal) {
    kill(-group, signal);
    kill(-group, SIGCONT);
}

/*
 * The first cause is the reason. kill(2) of -1 is every process of our namespace but ourselves, at once. Of a session it is
 * the process group of its command: processes that it has put elsewhere belong to the job.
 */
static void end_all(struct job *job, enum reason reason, int signal) {
    pid_t foreground;
    if (job->ending.reason == REASON_NONE)
        job->ending.reason = reason;
    if (is_session(job->options)) {
        end_group(job->command, signal);
        /* a shell has given its terminal to another one */
        if (job->options->terminal && ioctl(job->outputs->streams[0].pipe, TIOCGPGRP, &foreground) == 0 && foreground > 0)
            end_group(foreground, signal);
        return;
    }
    if (signal == SIGKILL) {
        kill_all(job->options);
        return;
    }
    kill(-1, signal);
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

/*
 * The sender of SIGTERM, such as a shutdown, later sends SIGKILL to every process that is left. That would kill init, and
 * the end would not be recorded. So init kills the job before that, by the timer of the job's limit, unless that limit ends
 * sooner. A session that is hung up ends in the same way.
 */
static void end_within_grace(struct job *job, int signal) {
    struct itimerspec left, grace = {.it_value.tv_sec = (time_t)job->options->grace};
    end_all(job, REASON_STOPPED, signal);
    if (job->timer < 0 || timerfd_gettime(job->timer, &left) < 0)
        return;
    bool unset = !left.it_value.tv_sec && !left.it_value.tv_nsec;
    if (unset || left.it_value.tv_sec >= grace.it_value.tv_sec)
        (void)timerfd_settime(job->timer, 0, &grace, NULL);
}

/*
 * The kernel delivers pending signals in the order of their numbers, so SIGQUIT comes first. A client that stops a job and
 * then kills it asks for SIGQUIT last: if init was held up for longer than the grace period, both signals are pending. So
 * init passes the other one on first, and a command that does not handle that signal ends by it.
 */
static void read_signals(struct job *job) {
    struct signalfd_siginfo info;
    bool ended_before = job->ended, quit = false;
    while (read(job->signals, &info, sizeof info) == sizeof info) {
        int number = (int)info.ssi_signo;
        if (number == SIGCHLD)
            reap(job, WNOHANG);
        else if (number == ENTERED)
            job->entered = true;
        else if (number == SIGQUIT)
            quit = true;
        else if (job->ended)
            continue;
        else if (number == SIGTERM)
            end_within_grace(job, SIGTERM);
        else
            end_all(job, REASON_STOPPED, number - SIGNAL_FIRST);
    }
    if (quit && ended_before)
        job->ending.killed_after_end = true;
    else if (quit)
        end_all(job, REASON_STOPPED, SIGKILL);
}

/* A client that has left a session may not come back: then the session must end, without waiting for its output. */
static void obey(struct job *job) {
    read_orders(job->control);
    if (job->options->terminal && !job->ended)
        resize_terminal(job->outputs->streams[0].pipe, &job->control->orders);
    if (!job->control->orders.hang_up || job->control->hung_up)
        return;
    job->control->hung_up = true;
    if (job->ended)
        job->ending.killed_after_end = true;
    else
        end_within_grace(job, SIGHUP);
}

static int sooner(int one_ms, int other_ms) {
    return one_ms < 0 || (other_ms >= 0 && other_ms < one_ms) ? other_ms : one_ms;
}

static enum reason reason_of(enum flow flow) {
    return flow == FLOW_OVER ? REASON_OUTPUT_LIMIT : flow == FLOW_FAILED ? REASON_OUTPUT_FAILED : REASON_NONE;
}

static void move(struct job *job, struct output *output) {
    enum flow before = output->flow;
    output->flow = move_output(output);
    if (output->flow == before)
        return;
    if ((output->flow == FLOW_OVER || output->flow == FLOW_FAILED) && !job->ended)
        end_all(job, reason_of(output->flow), SIGKILL);
    else if (output->flow == FLOW_END)
        close(output->pipe); /* the output is not read any more: a job that goes on writing gets SIGPIPE */
}

/* Wait for the next event. The state of a stream decides which of its two ends we wait for, if any. */
static void await(struct job *job) {
    enum { SIGNALS, TIMER, STDIN, INPUT, CONTROL, FIRST_STREAM };
    struct pollfd fds[FIRST_STREAM + STREAMS_MAX] = {
        [SIGNALS] = {.fd = job->signals, .events = POLLIN},
        [TIMER] = {.fd = job->timer, .events = POLLIN},
        /* also when there is nothing to write: that its reader has gone is always reported */
        [STDIN] = {.fd = job->input->pipe, .events = job->input->feed == FEED_MORE ? POLLOUT : 0},
        [INPUT] = {.fd = job->input->feed == FEED_DRY ? job->input->watch : -1, .events = POLLIN},
        [CONTROL] = {.fd = job->control->watch, .events = POLLIN},
    };
    int timeout_ms = job->input->feed == FEED_HELD ? HELD_RETRY_MS : -1;
    for (int i = 0; i < job->outputs->count; i++) {
        const struct output *output = &job->outputs->streams[i];
        bool readable = output->flow == FLOW_MORE || output->flow == FLOW_EMPTY, full = output->flow == FLOW_FULL;
        fds[FIRST_STREAM + i].fd = readable ? output->pipe : full ? output->file : -1;
        fds[FIRST_STREAM + i].events = readable ? POLLIN : POLLOUT;
        if (output->flow == FLOW_HELD)
            timeout_ms = sooner(timeout_ms, HELD_RETRY_MS);
        timeout_ms = sooner(timeout_ms, held_time_ms(&output->times));
    }
    if (poll(fds, (nfds_t)(FIRST_STREAM + job->outputs->count), timeout_ms) < 0)
        return;
    for (int i = 0; i < job->outputs->count; i++) {
        struct output *output = &job->outputs->streams[i];
        if (fds[FIRST_STREAM + i].revents || output->flow == FLOW_HELD)
            move(job, output);
        write_held_time(&output->times, false);
    }
    if (fds[STDIN].revents || fds[INPUT].revents || job->input->feed == FEED_HELD)
        feed_input(job->input);
    if (fds[CONTROL].revents)
        obey(job);
    if (fds[SIGNALS].revents)
        read_signals(job);
    if (fds[TIMER].revents) {
        job->timer = -1; /* it stays readable: a process that is slow to die must not make us spin */
        if (!job->ended)
            end_all(job, REASON_TIMED_OUT, SIGKILL);
    }
}

/*
 * All writers are dead: the pipe holds all the rest of the output. Only a full disk can delay its end. But a session may
 * leave processes to its job that go on writing: then a pipe holds more than all that its command has written.
 */
static void drain(struct job *job, struct output *output) {
    if (output->slave >= 0)
        close(output->slave);
    output->slave = -1;
    uint64_t left_least = is_session(job->options) && *output->left > PIPE_BYTES ? *output->left - PIPE_BYTES : 0;
    if (output->flow == FLOW_EMPTY)
        output->flow = FLOW_MORE; /* it was empty when we last looked */
    for (;;) {
        if (output->flow == FLOW_MORE && *output->left < left_least)
            break;
        if (output->flow == FLOW_MORE)
            move(job, output);
        else if ((output->flow == FLOW_HELD || output->flow == FLOW_FULL) && !job->ending.killed_after_end)
            await(job);
        else
            break;
    }
    if (job->ending.reason == REASON_NONE)
        job->ending.reason = reason_of(output->flow);
    check_end(output);
    write_held_time(&output->times, true);
}

/*
 * Orphans become our children at once, and sessions are, so without a child no process is left, and kill(2) of -1 need not
 * look through every process of the host; but for a process that may be making a session at this moment.
 */
static void end_rest(struct job *job) {
    read_signals(job); /* a session may have come since */
    if (!reap(job, WNOHANG) && !job->entered)
        return;
    kill_all(job->options);
    /* Blocking, until there is none: they all have SIGKILL pending, so none waits for us to read. */
    reap(job, 0);
}

struct ending run_job(const struct options *options, struct outputs *outputs, struct input *input, struct control *control,
                      int signals, int timer, pid_t command) {
    struct job job = {.options = options,
                      .outputs = outputs,
                      .input = input,
                      .control = control,
                      .signals = signals,
                      .timer = timer,
                      .command = command,
                      /*
                       * a session that comes while artifacts are packed must not keep the file of these: look in any case
                       */
                      .entered = !outputs->count};
    if (control->watch >= 0)
        obey(&job); /* orders written before we watched */
    while (!job.ended)
        await(&job);
    if (!is_session(options))
        end_rest(&job);
    for (int i = 0; i < outputs->count; i++)
        drain(&job, &outputs->streams[i]);
    return job.ending;
}
