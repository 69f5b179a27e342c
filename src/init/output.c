/*
 * Moves the job's output from its pipe to the output file. While the file takes nothing, no more is read: the pipe fills
 * and the job, in time, waits.
 *
 * By read(2) and write(2): splice(2) copies page by page, and slowly unless the bytes lie in the pipe's pages as they will
 * in the file's, which they do not after a first line. And write(2) wakes the watchers of the file, on every kernel.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

enum { BUFFER_BYTES = 128 << 10 };

/* Not in struct output: a buffer that the job never fills is never touched, and takes nothing of its memory limit. */
static char buffers[STREAMS_MAX][BUFFER_BYTES];

/* Gives the end that the job writes to. */
static int open_output(struct output *output, int file, int times, const struct options *options) {
    struct stat status;
    int flags = fcntl(file, F_GETFL), ends[2];
    if (flags < 0 || fstat(file, &status) < 0)
        fail(STEP_OUTPUT, NULL);
    if ((flags & O_ACCMODE) == O_RDONLY) {
        errno = EBADF;
        fail(STEP_OUTPUT, NULL);
    }
    bool regular = S_ISREG(status.st_mode);
    off_t end = regular ? lseek(file, 0, SEEK_END) : 0;
    if (end < 0)
        fail(STEP_OUTPUT, NULL);
    output->file = file;
    output->owner = status.st_uid;
    output->regular = regular;
    output->end = end;
    output->mode = status.st_mode & 0777;
    output->flow = FLOW_EMPTY;
    output->times = open_times(times, (uint64_t)end);
    output->slave = -1;
    if (options->terminal) {
        output->pipe = open_terminal(options, &output->slave);
        return output->slave;
    }
    if (pipe2(ends, O_CLOEXEC) < 0)
        fail(STEP_PIPE, NULL);
    /* only our end: whether the job's end blocks is the job's affair */
    if (fcntl(ends[0], F_SETFL, O_NONBLOCK) < 0)
        fail(STEP_PIPE, NULL);
    /* a smaller pipe works as well, only slower */
    fcntl(ends[0], F_SETPIPE_SZ, PIPE_BYTES);
    /* so that the job may open /dev/stdout, which opens the pipe anew */
    if (fchown(ends[1], options->uid, options->gid) < 0)
        fail(STEP_PIPE, NULL);
    output->pipe = ends[0];
    return ends[1];
}

void open_outputs(struct outputs *outputs, const struct options *options, int write_ends[STREAMS_MAX]) {
    *outputs = (struct outputs){
        .count = options->split_stderr ? STREAMS_MAX : 1,
        .left = options->output_max ? options->output_max : UINT64_MAX,
    };
    for (int i = 0; i < outputs->count; i++) {
        struct output *output = &outputs->streams[i];
        output->buffer = buffers[i];
        output->left = &outputs->left;
        write_ends[i] = open_output(output, options->output_fds[i], options->times_fds[i], options);
    }
}

/*
 * A pipe or terminal that is ready takes PIPE_BUF bytes without blocking, so that a reader that has stopped reading cannot
 * keep us from signals.
 */
static ssize_t write_some(const struct output *output) {
    size_t most = output->pending;
    if (!output->regular) {
        struct pollfd file = {.fd = output->file, .events = POLLOUT};
        if (poll(&file, 1, 0) < 1) {
            errno = EAGAIN;
            return -1;
        }
        if (most > PIPE_BUF)
            most = PIPE_BUF;
    }
    return write(output->file, output->buffer + output->start, most);
}

/*
 * The meaning of a failed write(2). FLOW_FULL: the file takes more when its reader catches up. FLOW_HELD: it takes more
 * when the operator has made space, or repaired a disk or a network; nothing is lost. FLOW_FAILED: it never takes more,
 * such as beyond a limit of the size of files; a job that waited would wait for ever.
 */
static enum flow flow_after(int error) {
    switch (error) {
    case EAGAIN:
    case EINTR: return FLOW_FULL;
    case EPIPE: return FLOW_END;
    case ENOSPC:
    case EDQUOT:
    case ENOMEM:
    case ENOBUFS:
    case EIO:
    case EROFS: /* also after an error of the disk */
    case ETIMEDOUT:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENETDOWN:
    case ENETUNREACH:
    case ENOLINK:
    case ECONNRESET:
    case ECONNREFUSED: return FLOW_HELD;
    /* EFBIG, EBADF, EINVAL, EPERM, ESTALE, ENXIO, ... */
    default: return FLOW_FAILED;
    }
}

/* A job that has written exactly its limit is not over it until it writes more. */
static void count(struct output *output, size_t got) {
    output->over = got > *output->left;
    output->start = 0;
    output->pending = output->over ? (size_t)*output->left : got;
    *output->left -= output->pending;
}

/*
 * Note in the sticky bit, which has no meaning for a file, whether output waits. A change of the mode takes no space on
 * the disk, and a server that starts later finds it. A running server watches it (IN_ATTRIB in inotify(7)). On a file
 * system that has become read-only this fails; the server detects such a file system by itself.
 */
static void note_held(struct output *output, bool held) {
    if (!output->regular || output->held == held)
        return;
    output->held = held;
    (void)fchmod(output->file, output->mode | (held ? S_ISVTX : 0));
}

/*
 * Init appends the job's output (O_APPEND). When the file ends before it should, another process has cut it short, and
 * bytes are lost. Note that in the file's mode, which takes no space on the disk, so that readers learn of it. The records
 * of times begin anew.
 */
static void note_cut(struct output *output, off_t end, off_t written) {
    bool cut = end < output->end; /* by hand, others may append to the same file */
    output->end = end;
    if (!cut)
        return;
    output->mode |= S_IXUSR;
    (void)fchmod(output->file, output->mode | (output->held ? S_ISVTX : 0));
    forget_times(&output->times, (uint64_t)(end - written));
}

void check_end(struct output *output) {
    struct stat status;
    if (output->regular && fstat(output->file, &status) == 0)
        note_cut(output, status.st_size, 0);
}

/*
 * Move the available bytes, up to a buffer; bytes that the file does not take are held, and tried again by the next call.
 */
enum flow move_output(struct output *output) {
    if (!output->pending && !output->over) {
        ssize_t got = read(output->pipe, output->buffer, BUFFER_BYTES);
        if (got == 0)
            return FLOW_END;
        if (got < 0 && errno == EIO && output->slave < 0 && isatty(output->pipe))
            return FLOW_END; /* no process has the terminal open, and all was read (n_tty_read() of the kernel) */
        if (got < 0)         /* EFAULT: no memory is left for the buffer */
            return errno == EAGAIN || errno == EINTR ? FLOW_EMPTY : FLOW_HELD;
        count(output, (size_t)got);
        output->read_ns = realtime_ns();
    }
    while (output->pending) {
        ssize_t put = write_some(output);
        if (put < 0) {
            enum flow flow = flow_after(errno);
            if (flow == FLOW_HELD)
                note_held(output, true);
            return flow;
        }
        output->start += (size_t)put;
        output->pending -= (size_t)put;
        output->end += put;
        if (output->regular)
            note_cut(output, lseek(output->file, 0, SEEK_CUR), put);
        note_time(&output->times, output->read_ns, (size_t)put);
    }
    note_held(output, false);
    return output->over ? FLOW_OVER : FLOW_MORE;
}

/*
 * The times of output, in a file beside it: records of 16 bytes (struct time_record), in order.
 *
 * At most one for each interval, which is 4 ms at first and doubles with every 16,384 records: so the file grows by 256 KiB
 * with each doubling of the job's age, to 7 MiB in a hundred years, and a time is late by at most 4 ms or an 8,000th of
 * that age. It is no part of the output: a record that cannot be written holds up nothing.
 */

enum { INTERVAL_MS = 4, RECORDS_PER_DOUBLING = 1 << 14, DOUBLINGS_MAX = 30, RETRY_MS = 250 };
static const int64_t NS_PER_MS = 1000000;
_Static_assert(sizeof(struct time_record) == 16, "what output/times.py reads");

static int64_t interval_ns(const struct times *times) {
    uint64_t doublings = times->count / RECORDS_PER_DOUBLING;
    return INTERVAL_MS * NS_PER_MS << (doublings < DOUBLINGS_MAX ? doublings : DOUBLINGS_MAX);
}

struct times open_times(int fd, uint64_t end) {
    return (struct times){.fd = fd, .end = end};
}

/*
 * The delay until the held record is written. The clock may be set back: then at once, but for a write that has just
 * failed.
 */
static int64_t due_in_ns(const struct times *times, int64_t now) {
    int64_t due = now < times->written_ns ? now : times->written_ns + interval_ns(times);
    int64_t retry_in = times->retry_ns - now;
    if (due < times->retry_ns && retry_in <= RETRY_MS * NS_PER_MS)
        due = times->retry_ns;
    return due > now ? due - now : 0;
}

int held_time_ms(const struct times *times) {
    if (!times->held.end)
        return -1;
    return (int)((due_in_ns(times, realtime_ns()) + NS_PER_MS - 1) / NS_PER_MS);
}

void write_held_time(struct times *times, bool at_once) {
    if (!times->held.end)
        return;
    int64_t now = realtime_ns();
    if (!at_once && due_in_ns(times, now))
        return;
    off_t place = (off_t)(times->count * sizeof times->held);
    if (pwrite(times->fd, &times->held, sizeof times->held, place) != sizeof times->held) {
        times->retry_ns = now + RETRY_MS * NS_PER_MS;
        return;
    }
    times->count++;
    /* when it was written, and not its own time: or two would come in each interval */
    times->written_ns = now;
    times->held.end = 0;
}

void note_time(struct times *times, int64_t ns, size_t bytes) {
    times->end += bytes;
    if (times->fd < 0)
        return;
    times->held = (struct time_record){.ns = ns, .end = times->end};
    /* `now` is when it was read, which spares asking for the time again */
    if (!due_in_ns(times, ns))
        write_held_time(times, true);
}

void forget_times(struct times *times, uint64_t end) {
    if (times->fd >= 0 && ftruncate(times->fd, 0) < 0)
        times->fd = -1; /* no times are better than wrong ones */
    *times = open_times(times->fd, end);
}
