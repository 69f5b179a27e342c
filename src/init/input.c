/*
 * Feeds the command's stdin, a pipe, from the input file, to which the server appends as a client sends. The
 * server makes the file read-only when it has all of it: that is the only end. Until then the command waits,
 * whatever becomes of client, server and launcher.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <termios.h>
#include <unistd.h>

enum { MOVED_MAX = 1 << 20 };

/*
 * The kernel counts instances of inotify for each user, 128 at first: by the client's, so that it takes none
 * away from root, which is all of the host.
 */
int watch_file(int file, uid_t uid) {
    char path[32];
    if (seteuid(uid) < 0)
        return -1;
    int watch = inotify_init1(IN_CLOEXEC | IN_NONBLOCK), error = errno;
    if (seteuid(0) < 0)
        return -1;
    errno = error;
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    return watch < 0 || inotify_add_watch(watch, path, IN_MODIFY | IN_ATTRIB) < 0 ? -1 : watch;
}

static int dup_for_us(int fd) {
    int copy = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    if (copy < 0)
        fail(STEP_TERMINAL, NULL);
    return copy;
}

void open_input(struct input *input, const struct options *options, const struct output *output, int *read_end) {
    int ends[2];
    *input = (struct input){.file = options->input_fd, .watch = -1, .pipe = -1, .feed = FEED_OVER};
    *read_end = options->terminal ? dup_for_us(output->slave) : -1;
    if (input->file < 0)
        return;
    input->watch = watch_file(input->file, options->uid);
    if (input->watch < 0)
        fail(STEP_INPUT, NULL);
    input->feed = FEED_MORE;
    if (options->terminal) {
        input->terminal = true;
        input->pipe = dup_for_us(output->pipe);
        return;
    }
    if (pipe2(ends, O_CLOEXEC) < 0 || fcntl(ends[1], F_SETFL, O_NONBLOCK) < 0)
        fail(STEP_PIPE, NULL);
    /* so that the job may open /dev/stdin, which opens the pipe anew */
    if (fchown(ends[0], options->uid, options->gid) < 0)
        fail(STEP_PIPE, NULL);
    input->pipe = ends[1];
    *read_end = ends[0];
}

static void stop_feeding(struct input *input) {
    /* the file as well: the server sees by its lock that it is not read any more */
    close(input->file);
    close(input->pipe);
    if (input->watch >= 0)
        close(input->watch);
    *input = (struct input){.file = -1, .watch = -1, .pipe = -1, .feed = FEED_OVER};
}

static bool is_whole(const struct input *input) {
    struct stat status;
    return fstat(input->file, &status) == 0 && !(status.st_mode & S_IWUSR);
}

/*
 * splice(2) takes no terminal and a file. The end of the input is a key, as a user would type it: Ctrl-D, twice in the
 * midst of a line; to a program that reads single keys it means nothing.
 */
static ssize_t type_input(struct input *input, bool whole) {
    char keys[1024];
    struct termios settings;
    ssize_t got = pread(input->file, keys, sizeof keys, input->typed);
    if (got == 0 && whole && tcgetattr(input->pipe, &settings) == 0 && settings.c_lflag & ICANON) {
        char end[2] = {(char)settings.c_cc[VEOF], (char)settings.c_cc[VEOF]};
        if (write(input->pipe, end, !input->last || input->last == '\n' ? 1 : 2) < 0)
            return errno == EAGAIN ? -1 : 0;
    }
    if (got <= 0)
        return got;
    ssize_t put = write(input->pipe, keys, (size_t)got);
    if (put > 0) {
        input->typed += put;
        input->last = keys[put - 1];
    }
    return put;
}

/* Move as many bytes as the file has and the pipe takes. splice(2): from the page cache into a pipe it copies nothing. */
void feed_input(struct input *input) {
    char events[1024];
    while (input->watch >= 0 && read(input->watch, events, sizeof events) > 0) {}
    /* Look for the end first: bytes written before it are read by the calls after the look. */
    bool whole = is_whole(input);
    ssize_t moved = input->terminal ? type_input(input, whole)
                                    : splice(input->file, NULL, input->pipe, NULL, MOVED_MAX, SPLICE_F_NONBLOCK);
    if (moved > 0)
        input->feed = FEED_MORE;
    else if (moved == 0 && !whole)
        input->feed = FEED_DRY;
    else if (moved == 0 || errno == EPIPE)
        stop_feeding(input);
    else /* EIO, ENOMEM: never an end, which would cut the input short in silence */
        input->feed = errno == EAGAIN || errno == EINTR ? FEED_MORE : FEED_HELD;
}
