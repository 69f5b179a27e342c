/*
 * The spawner: a process of the launcher's that lives on and clones inits. None of them costs an exec, and work that is the
 * same for all is done once. The launcher decides everything and hands over finished requests: the command line of an init
 * that waits (options.c), and its descriptors. Nothing in it was written by a client or by the server.
 *
 * Init is the launcher's child (CLONE_PARENT), so when the spawner ends no init notices, and the launcher starts another.
 * It ends by itself when the launcher is gone. It keeps nothing of one init for the next.
 */
#include "init.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
/* Requests come by the first; the descriptors of a request have the numbers from the second one on, as it names them. */
enum { REQUESTS_FD = 3, FIRST_FD };

static char request[REQUEST_MAX_BYTES];

/* Our command line, which ps(1) shows, has room for that of an init: a job's number may be long. */
static char *shown;
static size_t shown_bytes;

/* Without this, ps and systemd-cgls would show the spawner, an init that waits and one that has a job alike. */
void show_state(const struct options *options, const char *state) {
    if (!shown)
        return;
    memset(shown, 0, shown_bytes);
    snprintf(shown, shown_bytes, "pjw-init: %s%c--hostname%c%s%c--scratch%c%s", state, 0, 0,
             options->hostname ? options->hostname : "", 0, 0, options->scratch ? options->scratch : "");
}

void leave_spawner(const struct options *options) {
    if (!shown)
        return;
    close(REQUESTS_FD);
    signal(SIGPIPE, SIG_DFL);
    signal(SIGCHLD, SIG_DFL);
    show_state(options, "waiting");
}

static void close_descriptors(void) {
    if (syscall(SYS_close_range, (unsigned)FIRST_FD, ~0U, 0U) < 0)
        fail(STEP_DESCRIPTORS, NULL);
}

static size_t read_request(void) {
    int fds[REQUEST_FDS_MAX];
    size_t fd_count, length = receive(STEP_REQUEST, REQUESTS_FD, request, sizeof request, fds, REQUEST_FDS_MAX, &fd_count);
    for (size_t i = 0; length && i < fd_count; i++)
        if (fds[i] != FIRST_FD + (int)i) {
            errno = EBADMSG;
            fail(STEP_REQUEST, NULL);
        }
    return length;
}

/*
 * A launcher that is gone wants nothing any more. Its successor may have looked for jobs already, and must not miss one
 * that is made later, from a request that waited for us.
 */
static bool is_wanted(const struct options *options) {
    struct pollfd report = {.fd = options->report_fd};
    return poll(&report, 1, 0) == 0;
}

void spawn_inits(int argc, char **argv) {
    bool prepared = false;
    shown = argv[0];
    shown_bytes = (size_t)(argv[argc - 1] + strlen(argv[argc - 1]) + 1 - shown);
    signal(SIGPIPE, SIG_IGN); /* an init may be killed before it reads that it may go on */
    signal(SIGCHLD, SIG_IGN); /* the kernel collects the processes that make sessions (session.c) */
    setsid();                 /* no signal of a terminal is for us; it fails in a process that leads a group already */
    close_descriptors();
    for (size_t length; (length = read_request()) != 0;) {
        struct options options;
        parse_request(request, length, &options);
        /* with the first request, so that a failure belongs to a launch, which reports it */
        if (!prepared)
            prepare(&options);
        prepared = true;
        if (options.mount_count)
            enter_template(&options);
        if (is_wanted(&options) && spawn_init(&options) < 0)
            report_failed(STEP_CLONE, NULL);
        report_to(-1);
        close_descriptors();
    }
    _exit(0);
}
