/* Init's messages: reports to the launcher, the status file, and messages for a person. */
#include "init.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { EXIT_SETUP = 125, EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127 };
enum { REPORT_MAX_BYTES = 512 }; /* spawn.py reads as many; a longer subject is cut short */

/* clang-format off */
static const struct {
    const char *name, *words;
} STEP_TABLE[] = {
    [STEP_NONE] = {"none", "go on"},
#define STEP_ROW(id, name, words) [STEP_##id] = {name, words},
    STEPS(STEP_ROW)
#undef STEP_ROW
};
/* clang-format on */

static const char *const REASON_NAMES[] = {"none", "stopped", "timed_out", "output_limit", "output_failed"};

static int report_fd = -1;
static int failures_fd = -1; /* the status file, while artifacts are packed */
static off_t status_offset;

void report_to(int fd) {
    report_fd = fd;
}

size_t receive(enum step step, int socket, char *bytes, size_t bytes_max, int *fds, size_t fds_max, size_t *fd_count) {
    struct iovec data = {.iov_base = bytes, .iov_len = bytes_max};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int) * (REQUEST_FDS_MAX + ORDER_FDS_MAX))]; /* whichever it is */
    } control = {0};
    /* CMSG_SPACE would have room for one descriptor too many */
    struct msghdr message = {
        .msg_iov = &data, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = CMSG_LEN(sizeof(int) * fds_max)};
    ssize_t length;
    while ((length = recvmsg(socket, &message, MSG_CMSG_CLOEXEC)) < 0 && errno == EINTR) {}
    if (length == 0)
        return 0;
    if (length < 0)
        fail(step, NULL);
    /* Descriptors, once: other data of a socket (credentials, unix(7)) would be read as their numbers. */
    struct cmsghdr *rights = CMSG_FIRSTHDR(&message);
    if (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC) || !rights || rights->cmsg_level != SOL_SOCKET ||
        rights->cmsg_type != SCM_RIGHTS || CMSG_NXTHDR(&message, rights)) {
        errno = EBADMSG;
        fail(step, NULL);
    }
    size_t fds_bytes = rights->cmsg_len - CMSG_LEN(0);
    memcpy(fds, CMSG_DATA(rights), fds_bytes);
    *fd_count = fds_bytes / sizeof *fds;
    return (size_t)length;
}

/* A launcher that is gone before it has ordered anything wants nothing any more. */
void await_order(struct options *options) {
    static char words[ORDER_MAX_BYTES];
    int fds[ORDER_FDS_MAX];
    size_t fd_count, length = receive(STEP_ORDER, report_fd, words, sizeof words, fds, ORDER_FDS_MAX, &fd_count);
    if (!length)
        _exit(0);
    parse_order(words, length, fds, fd_count, options);
}

/* A launcher that is gone is no reason to stop: its successor finds the job by its cgroup. */
static void send_report(const char *text, const int *fds, size_t fd_count) {
    struct iovec data = {.iov_base = (void *)text, .iov_len = strlen(text)};
    union {
        struct cmsghdr header;
        char space[CMSG_SPACE(sizeof(int) * LISTENERS_MAX)];
    } control = {0};
    struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
    if (fd_count) {
        message.msg_control = control.space;
        message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
        control.header.cmsg_level = SOL_SOCKET;
        control.header.cmsg_type = SCM_RIGHTS;
        control.header.cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
        memcpy(CMSG_DATA(&control.header), fds, sizeof(int) * fd_count);
    }
    while (sendmsg(report_fd, &message, MSG_NOSIGNAL) < 0) {
        if (errno == ENOTSOCK) /* a pipe or a file, by hand: one line for each report */
            dprintf(report_fd, "%s\n", text);
        if (errno != EINTR)
            return;
    }
}

void report_cloned(int pidfd) {
    if (report_fd >= 0)
        send_report("cloned", &pidfd, 1);
}

void report_connected(int socket) {
    send_report("connected", &socket, 1);
}

void report_listening(const int *sockets, size_t count) {
    if (report_fd >= 0)
        send_report("listening", sockets, count);
}

void report_opened(int tree) {
    send_report("opened", &tree, 1);
}

void report_execed(int64_t ns) {
    if (report_fd < 0)
        return;
    char text[64];
    snprintf(text, sizeof text, "execed %lld", (long long)ns);
    send_report(text, NULL, 0);
    close(report_fd);
    report_fd = -1;
}

void begin(const struct options *options, enum step step, const char *subject) {
    if (options->tells)
        dprintf(STDERR_FILENO, "pjw-init: about to %s%s%s\n", STEP_TABLE[step].words, subject ? " " : "",
                subject ? subject : "");
}

void report_failed(enum step step, const char *subject) {
    int error = errno;
    if (report_fd >= 0) {
        char text[REPORT_MAX_BYTES];
        snprintf(text, sizeof text, "failed %s %d %s%s%s", STEP_TABLE[step].name, error, STEP_TABLE[step].words,
                 subject ? " " : "", subject ? subject : "");
        send_report(text, NULL, 0);
    } else if (failures_fd >= 0) {
        char text[REPORT_MAX_BYTES];
        const char *why = strerror(error);
        snprintf(text, sizeof text, "cannot %s: %c%s", STEP_TABLE[step].words, tolower((unsigned char)why[0]), why + 1);
        record_artifacts(failures_fd, "failed", text);
    } else {
        const char *why = strerror(error);
        dprintf(STDERR_FILENO, "pjw-init: cannot %s%s%s: %c%s\n", STEP_TABLE[step].words, subject ? " " : "",
                subject ? subject : "", tolower((unsigned char)why[0]), why + 1);
    }
    errno = error;
}

void fail(enum step step, const char *subject) {
    report_failed(step, subject);
    if (step != STEP_EXEC)
        _exit(EXIT_SETUP);
    _exit(errno == ENOENT ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE);
}

int64_t realtime_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/*
 * The server filled the file with zero bytes, so that these few fit even when the disk is full by then.
 * Each record is one pwrite(2): a reader sees all of it or nothing.
 */
static bool record(int fd, const char *text) {
    size_t length = strlen(text);
    if (fd < 0)
        return true;
    ssize_t written = pwrite(fd, text, length, status_offset);
    if (written >= 0 && (size_t)written < length)
        errno = ENOSPC;
    if (written != (ssize_t)length)
        return false;
    status_offset += written;
    return true;
}

void record_start(int status_fd, int64_t ns) {
    char text[64];
    snprintf(text, sizeof text, "started %lld\n", (long long)ns);
    if (!record(status_fd, text))
        fail(STEP_STATUS, NULL); /* the exit of PID 1 ends the command too: a job without a record is none */
}

void record_end(int status_fd, int64_t ns, int wait_status, enum reason reason) {
    char text[96];
    bool signaled = WIFSIGNALED(wait_status);
    snprintf(text, sizeof text, "ended %lld %s %d %s\n", (long long)ns, signaled ? "signaled" : "exited",
             signaled ? WTERMSIG(wait_status) : WEXITSTATUS(wait_status), REASON_NAMES[reason]);
    record(status_fd, text); /* no one is left to tell of a failure; a missing record says "lost" */
}

void record_failures(int status_fd) {
    failures_fd = status_fd;
}

void record_artifacts(int status_fd, const char *outcome, const char *words) {
    char text[512];
    snprintf(text, sizeof text, "artifacts %s %s\n", outcome, words);
    record(status_fd, text); /* without it the file alone says whether there are any */
}
