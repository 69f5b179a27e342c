/*
 * Moves what the job writes from its pipe to the output file, without a copy through here, and wakes who
 * watches the file. While the file takes nothing the bytes stay in the pipe and the job, in time, waits.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

enum { PIPE_BYTES = 1 << 20, BURST_BYTES = 1 << 20 };

void open_output(struct output *output, const struct options *options, int *write_end) {
    struct stat status;
    int flags = fcntl(options->output_fd, F_GETFL), ends[2];
    if (flags < 0 || fstat(options->output_fd, &status) < 0)
        fail(STEP_OUTPUT, NULL);
    if ((flags & O_ACCMODE) == O_RDONLY) {
        errno = EBADF;
        fail(STEP_OUTPUT, NULL);
    }
    /* splice(2) refuses O_APPEND, as in `pjw-init ... >> log` */
    bool seekable = S_ISREG(status.st_mode) && !(flags & O_APPEND);
    *output = (struct output){
        .file = options->output_fd,
        .owner = status.st_uid,
        .seekable = seekable,
        .splice = seekable,
        .offset = seekable ? status.st_size : 0,
        .left = options->output_max ? options->output_max : UINT64_MAX,
    };
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
    *write_end = ends[1];
}

/*
 * Kernels before 6.4 send no IN_MODIFY for splice(2) unless a later fix was ported back to them; a change of
 * the modification time is one to them all. On a new kernel it is a second event, which the kernel merges
 * with the first unless that was read within the microsecond that this takes. Not ftruncate(2) to the same
 * size: an IN_MODIFY as well, but twice the cost.
 */
static void wake_watchers(const struct output *output) {
    futimens(output->file, (struct timespec[2]){{.tv_nsec = UTIME_OMIT}, {.tv_nsec = UTIME_NOW}});
}

/*
 * For what splice(2) cannot write to. A pipe or terminal that is ready takes PIPE_BUF bytes without blocking,
 * so that a reader who has stopped reading cannot keep us from signals.
 */
static ssize_t copy_some(struct output *output, size_t most) {
    if (!output->pending) {
        size_t room = sizeof output->buffer;
        ssize_t got = read(output->pipe, output->buffer, most < room ? most : room);
        if (got <= 0)
            return got;
        output->pending = (size_t)got;
        output->start = 0;
    }
    const char *from = output->buffer + output->start;
    struct pollfd file = {.fd = output->file, .events = POLLOUT};
    if (!output->seekable && poll(&file, 1, 0) == 0) {
        errno = EAGAIN;
        return -1;
    }
    ssize_t put = output->seekable ? pwrite(output->file, from, output->pending, output->offset)
                                   : write(output->file, from, output->pending);
    if (put > 0) {
        output->pending -= (size_t)put;
        output->start += (size_t)put;
        output->offset += put;
    }
    return put;
}

static ssize_t move_some(struct output *output, size_t most) {
    if (most > output->left)
        most = output->left;
    if (!output->splice)
        return copy_some(output, most);
    unsigned flags = SPLICE_F_NONBLOCK | SPLICE_F_MOVE;
    ssize_t moved = splice(output->pipe, NULL, output->file, &output->offset, most, flags);
    if (moved < 0 && errno == EINVAL) { /* a file system without it */
        output->splice = false;
        return copy_some(output, most);
    }
    return moved;
}

static enum flow stopped_by(const struct output *output, int error) {
    if (error == EAGAIN || error == EINTR)
        return output->pending ? FLOW_FULL : FLOW_EMPTY;
    if (error == EPIPE)
        return FLOW_END;
    return FLOW_HELD; /* ENOSPC, EDQUOT, EIO: nothing is lost, it is tried again */
}

/* Move what is there, up to a burst. */
enum flow move_output(struct output *output) {
    enum flow flow = FLOW_MORE;
    size_t burst = 0;
    while (flow == FLOW_MORE && burst < BURST_BYTES) {
        char beyond;
        bool full = output->left == 0;
        /* A job that has written exactly what it may is not over its limit until it writes more. */
        ssize_t moved = full ? read(output->pipe, &beyond, 1) : move_some(output, BURST_BYTES - burst);
        if (moved < 0)
            flow = stopped_by(output, errno);
        else if (moved == 0)
            flow = FLOW_END;
        else if (full)
            flow = FLOW_OVER;
        else {
            burst += (size_t)moved;
            if (output->left != UINT64_MAX)
                output->left -= (size_t)moved;
        }
    }
    if (burst && output->seekable)
        wake_watchers(output);
    return flow;
}
