/*
 * Two stages: the first clones init; init is PID 1 of the job until the job's end. Under the launcher the first stage is
 * the spawner, which clones one init after the other. By hand it waits for its only one.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

/*
 * Dispositions and the mask survive an exec: Python ignores SIGPIPE, and a shell may ignore SIGINT. By the
 * system call: libc's signal() refuses 32 and 33, which its posix_spawn() leaves ignored in every child.
 */
static void reset_signals(void) {
    static const struct {
        unsigned long handler, flags, restorer, mask;
    } by_default; /* struct sigaction as the kernel has it: all zero is SIG_DFL */
    for (int number = 1; number < NSIG; number++)
        syscall(SYS_rt_sigaction, number, &by_default, NULL, sizeof by_default.mask); /* not SIGKILL, SIGSTOP */
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGCHLD);
    sigaddset(&ours, SIGTERM);
    sigaddset(&ours, SIGQUIT);
    sigaddset(&ours, SIGINT);
    sigaddset(&ours, ENTERED);
    for (int number = SIGNAL_FIRST + 1; number <= SIGNAL_LAST; number++)
        sigaddset(&ours, number);
    sigprocmask(SIG_SETMASK, &ours, NULL); /* init inherits it, see open_signals() */
}

/*
 * 0 to 2 must be open, so that no descriptor made later is one of them. And an init with a launcher lives as long as its
 * job: it must not hold a user's terminal or log pipe open.
 */
static void tidy_standard_fds(const struct options *options) {
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    for (int fd = 0; fd <= 2; fd++) {
        bool used = fd == options->status_fd || fd == options->report_fd;
        for (int i = 0; i < STREAMS_MAX; i++)
            used |= fd == options->output_fds[i];
        bool closed = fcntl(fd, F_GETFD) < 0 || (options->report_fd >= 0 && !used);
        if (closed && (null < 0 || (null != fd && dup2(null, fd) < 0)))
            fail(STEP_STDIO, NULL);
    }
    if (null > 2)
        close(null);
}

static int exit_code(int wait_status) {
    return WIFSIGNALED(wait_status) ? 128 + WTERMSIG(wait_status) : WEXITSTATUS(wait_status);
}

static _Noreturn void be_init(struct options *options, int go) {
    char byte;
    int error = enter_cgroups(options);
    /* the launcher must hear of the clone before it hears anything from the clone */
    if (read(go, &byte, 1) != 1)
        fail(STEP_STAGE0, NULL);
    close(go);
    errno = error;
    if (error)
        fail(STEP_CGROUP, NULL);
    bool session = is_session(options);
    if (session) {
        enter_job(options);
        if (options->connect_port)
            hand_over_connection(options);
        if (options->listener_count) {
            hand_over_listeners(options);
            _exit(0);
        }
    } else {
        enter_namespaces(options);
        if (!is_in_template())
            make_template(options);
        make_mounts(options);
    }
    int read_end, write_ends[STREAMS_MAX], signals = open_signals(options);
    if (options->waits) {
        await_order(options);
        show_state(options, session ? "session" : "running");
    }

    struct outputs outputs;
    struct input input;
    struct control control;
    if (!session) {
        finish_mounts(options);
        if (options->link)
            join_network(options);
        if (options->listener_count)
            hand_over_listeners(options);
    }
    open_outputs(&outputs, options, write_ends);
    open_input(&input, options, &outputs.streams[0], &read_end);
    open_control(&control, options);
    if (options->upload)
        unpack_upload(options);
    if (!options->keep && options->archive_fd >= 0)
        close(options->archive_fd);
    pid_t command = start_command(options, read_end, write_ends[0], write_ends[outputs.count - 1]);
    if (read_end >= 0)
        close(read_end); /* or no reader could tell that the job has closed its own */
    for (int i = 0; i < outputs.count; i++)
        if (outputs.streams[i].slave < 0)
            close(write_ends[i]); /* or the pipe would never end */
    int64_t started_ns = realtime_ns();
    int timer = open_timer(options->time_max);
    keep_only_kill(outputs.streams[0].owner, options->keep);
    if (options->report_fd < 0)
        prctl(PR_SET_PDEATHSIG, SIGKILL); /* no launcher would end us; now, as a new fsuid clears it */
    record_start(options->status_fd, started_ns);
    report_execed(started_ns);
    release_command(options);

    struct ending ending = run_job(options, &outputs, &input, &control, signals, timer, command);
    record_end(options->status_fd, ending.ended_ns, ending.wait_status, ending.reason);
    if (options->keep)
        keep_artifacts(options, &ending, signals, outputs.streams[0].owner);
    _exit(options->report_fd >= 0 ? 0 : exit_code(ending.wait_status));
}

/* By hand: pass signals on to init, and its exit code to our caller. */
static int wait_for_init(pid_t init) {
    sigset_t set;
    int number, status = 0;
    sigprocmask(SIG_BLOCK, NULL, &set);
    while (waitpid(init, &status, WNOHANG) == 0) {
        if ((number = sigwaitinfo(&set, NULL)) > 0 && number != SIGCHLD)
            kill(init, number == SIGINT ? SIGTERM : number);
    }
    return exit_code(status);
}

void prepare(const struct options *options) {
    tidy_standard_fds(options);
    set_inherited();
    /* Before the clone, in the host's /proc. It takes CAP_SYS_RESOURCE, which a container may lack. */
    if (set_oom_score_adj("-1000") < 0 && errno != EACCES && errno != EPERM)
        fail(STEP_OOM_SCORE, NULL);
    bound_to_kill();
}

pid_t spawn_init(struct options *options) {
    int go[2], pidfd = -1;
    if (pipe2(go, O_CLOEXEC) < 0)
        return -1;
    pid_t init = is_session(options) ? clone_session(options, &pidfd) : clone_init(options, &pidfd);
    if (init < 0)
        return -1;
    if (init == 0) {
        close(go[1]);
        leave_spawner(options);
        be_init(options, go[0]);
    }
    if (pidfd >= 0)
        report_cloned(pidfd);
    return write(go[1], "", 1) == 1 ? init : -1;
}

int main(int argc, char **argv) {
    struct options options;
    reset_signals();
    parse_options(argc, argv, &options);
    if (options.spawner)
        spawn_inits(argc, argv);
    if (options.source_count)
        hand_over_sources(&options);
    prepare(&options);
    pid_t init = spawn_init(&options);
    if (init < 0)
        fail(STEP_CLONE, NULL);
    return options.report_fd >= 0 ? 0 : wait_for_init(init);
}
