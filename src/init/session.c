/*
 * A session: another command in a job that runs. The process that waits for it here is not PID 1 of the job but one more of
 * its processes: in the job's PID namespace, so that the job's end needs no process outside, and in its cgroup, so that all
 * of it counts there. It is root's, as init is, and treats output, input and the record of the end as init does (main.c).
 *
 * It becomes a child of the job's init, as every orphan there. A job ends when each of its processes was collected: so no
 * process outside, which may be stopped, or may collect nothing, is the parent of any of them.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <netinet/in.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

enum { CONNECT_MS = 10000 };

#ifdef __SANITIZE_ADDRESS__
/* its vfork(2) keeps one return address for each thread, and a second one takes the place of the first */
#define vfork_within fork
#define WITHIN_MAP MAP_SHARED
#else
#define vfork_within vfork
#define WITHIN_MAP MAP_PRIVATE
#endif

bool is_session(const struct options *options) {
    return options->enter_fd >= 0;
}

/*
 * By the spawner: only a child enters a PID namespace. The rest is entered by the session itself: with CLONE_INTO_CGROUP the
 * kernel looks from our cgroup namespace at both cgroups, and from the job's it would not see ours.
 *
 * Two processes are in between, and both have ended before we go on. The second one is in the job: it makes the session,
 * reports it, and its end leaves the session to init. The first one enters, so that no later init of ours is made in this
 * job, and collects the second one. The spawner cannot: it may be killed just then, and the job's end would wait until the
 * host's PID 1 collects.
 */
pid_t clone_session(const struct options *options, int *pidfd) {
    struct clone_args args = {
        .flags = CLONE_PIDFD,
        .pidfd = (uintptr_t)pidfd,
        .exit_signal = SIGCHLD,
    };
    static volatile int *error; /* no local variable: a fork shares none */
    if (!error) {
        void *page = mmap(NULL, sizeof *error, PROT_READ | PROT_WRITE, WITHIN_MAP | MAP_ANONYMOUS, -1, 0);
        if (page == MAP_FAILED)
            return -1;
        error = page;
    }
    /* until the session was reported: the launcher must hear of the clone first of all, and one in between may be killed */
    *error = ECANCELED;
    pid_t first = vfork();
    if (first == 0) {
        pid_t second = setns(options->enter_fd, CLONE_NEWPID) < 0 ? -1 : vfork_within();
        if (second == 0) {
            pid_t pid = clone_into_cgroup(&args, options);
            if (pid == 0)
                return 0; /* a copy, which is free to */
            if (pid > 0)
                report_cloned(*pidfd);
            *error = pid < 0 ? errno : 0;
        } else if (second < 0) {
            *error = errno;
        }
        /*
         * A vfork goes on when the second one has left our memory, before it has ended. The host's PID 1 gets a child that
         * ends after us.
         */
        while (second > 0 && waitpid(second, NULL, 0) < 0 && errno == EINTR)
            ;
        _exit(0);
    }
    if (first < 0)
        *error = errno;
    *pidfd = -1; /* it was the other one's */
    errno = *error;
    return *error ? -1 : first;
}

/* Signals are for the command: init sends those of a stop to every process of the job. */
void enter_job(const struct options *options) {
    sigset_t all;
    sigfillset(&all);
    sigprocmask(SIG_SETMASK, &all, NULL);
    if (setns(options->enter_fd, CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP) < 0)
        fail(STEP_ENTER, NULL);
    join_keyring();
}

void open_control(struct control *control, const struct options *options) {
    *control = (struct control){.file = options->control_fd, .watch = -1};
    if (control->file < 0)
        return;
    control->watch = watch_file(control->file, options->uid);
    if (control->watch < 0)
        fail(STEP_CONTROL, NULL);
}

void read_orders(struct control *control) {
    char events[1024];
    struct orders orders;
    while (read(control->watch, events, sizeof events) > 0) {}
    if (pread(control->file, &orders, sizeof orders, 0) == sizeof orders)
        control->orders = orders;
}

/* A program may listen at one of the two loopback addresses alone. Where a queue is full it takes the kernel a while. */
static bool connect_to(int fd, const struct sockaddr *address, socklen_t length) {
    struct pollfd connected = {.fd = fd, .events = POLLOUT};
    int error = 0;
    if (fd < 0)
        return false;
    if (connect(fd, address, length) < 0 && errno != EINPROGRESS)
        return false;
    if (poll(&connected, 1, CONNECT_MS) == 0)
        error = ETIMEDOUT;
    else
        getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &(socklen_t){sizeof error});
    errno = error;
    return !error;
}

/*
 * A socket belongs to the network namespace in which it was made, whichever process has it then. It counts in the job's
 * cgroup, and is its user's.
 */
void hand_over_connection(const struct options *options) {
    uint16_t port = htons(options->connect_port);
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = port, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 address6 = {.sin6_family = AF_INET6, .sin6_port = port, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    enum { TYPE = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC };
    enum step failed = become_user(options->uid, options->gid);
    if (failed)
        fail(failed, NULL);
    int fd = socket(AF_INET, TYPE, 0);
    if (!connect_to(fd, (struct sockaddr *)&address, sizeof address)) {
        int error = errno;
        fd = socket(AF_INET6, TYPE, 0);
        if (!connect_to(fd, (struct sockaddr *)&address6, sizeof address6)) {
            errno = error;
            fail(STEP_CONNECT, NULL);
        }
    }
    report_connected(fd);
    _exit(0);
}

/* The terminal of a job or a session: in the job's own devpts, and its user's. */

void resize_terminal(int master, const struct orders *orders) {
    struct winsize size = {
        .ws_row = orders->rows, .ws_col = orders->columns, .ws_xpixel = orders->width, .ws_ypixel = orders->height};
    ioctl(master, TIOCSWINSZ, &size); /* tells the foreground processes, where it has changed */
}

/* The size is there before the command, which may look at it first of all. */
int open_terminal(const struct options *options, int *slave) {
    int locked = 0;
    struct orders orders;
    /* devpts gives a new terminal to the user that opens it */
    setfsgid(options->gid);
    setfsuid(options->uid);
    int master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC), error = errno;
    setfsuid(0);
    setfsgid(0);
    errno = error;
    if (master < 0 || ioctl(master, TIOCSPTLCK, &locked) < 0)
        fail(STEP_TERMINAL, NULL);
    /* not by its name, which is the job's to replace: it need not be the file that is there then */
    *slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*slave < 0)
        fail(STEP_TERMINAL, NULL);
    if (pread(options->control_fd, &orders, sizeof orders, 0) == sizeof orders)
        resize_terminal(master, &orders);
    return master;
}
