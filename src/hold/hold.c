/*
 * pjw-hold: what Slurm runs in the place of jobs. While it lives, its share of the node is pjw's. It tells the pjwd of
 * its node that it is there, and pjwd runs jobs of the gateway in its place, one after the other. A job is no child of
 * it: pjwd and Slurm may be restarted, and the job goes on.
 *
 *   pjw-hold SOCKET SHAPE UUID     with Slurm's SLURM_JOB_ID in the environment
 *   gcc -std=gnu17 -Wall -Wextra -Werror -Os -static -o pjw-hold hold.c
 *
 * SHAPE is how much of a node it holds, in the words of the gateway; UUID names the job for which it was submitted.
 * Both are the gateway's, and mean nothing here. Messages are datagrams of text (pjw/node/holds.py has the other end):
 *   to pjwd     hold 1 SLURM_JOB_ID AGE SHAPE UUID JOB     after each connection; JOB is the one that it has, or -
 *               end                                        Slurm wants the place back
 *   from pjwd   job JOB                                    this job is about to begin here; - for none
 *               done, refused WORDS                        there is no more to hold for
 * Which job it has is kept here, since this process lives as long as its place does, and pjwd may not.
 * Exits 0 when it is done, 64 for arguments that it cannot use, 71 without a pjwd, 75 when it was refused.
 */
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
enum { EXIT_DONE = 0, EXIT_ARGUMENTS = 64, EXIT_NO_PJWD = 71, EXIT_REFUSED = 75 };
enum { WORD_MAX_BYTES = 256, MESSAGE_MAX_BYTES = 5 * WORD_MAX_BYTES };
/* A pjwd that is restarted is back before that. */
enum { AWAY_MAX_MS = 60 * 1000, PAUSE_MS = 20, PAUSE_MAX_MS = 200 };

static struct sockaddr_un pjwd = {.sun_family = AF_UNIX};
static const char *slurm_job, *shape, *uuid;
static char job[WORD_MAX_BYTES] = "-";
static long long begun_ms;
static bool is_ending; /* Slurm has told us to end */

static void leave(int code, const char *words) {
    fprintf(stderr, "pjw-hold: %s\n", words);
    _exit(code);
}

static long long now_ms(void) {
    struct timespec now;
    clock_gettime(CLOCK_BOOTTIME, &now);
    return now.tv_sec * 1000LL + now.tv_nsec / 1000000;
}

/* Words of messages: printable, without a space, so that each message has one meaning. */
static bool is_word(const char *text) {
    size_t length = strlen(text);
    for (size_t i = 0; i < length; i++)
        if (text[i] <= ' ' || text[i] > '~')
            return false;
    return length > 0 && length < WORD_MAX_BYTES;
}

static void say(int socket, const char *message) {
    /* a pjwd that has gone is noticed when we read */
    while (send(socket, message, strlen(message), MSG_NOSIGNAL) < 0 && errno == EINTR) {}
}

static int connected(void) {
    int made = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (made < 0)
        leave(EXIT_NO_PJWD, "cannot make a socket");
    if (connect(made, (struct sockaddr *)&pjwd, sizeof pjwd) < 0) {
        int why = errno;
        close(made);
        if (why == EACCES || why == EPERM)
            leave(EXIT_REFUSED, "pjwd lets in only root and the user of its cluster.hold_user");
        return -1;
    }
    char message[MESSAGE_MAX_BYTES];
    snprintf(message, sizeof message, "hold 1 %s %lld %s %s %s", slurm_job, (now_ms() - begun_ms) / 1000, shape, uuid, job);
    say(made, message);
    if (is_ending)
        say(made, "end");
    return made;
}

/* Whether pjwd is still there. */
static bool heard(int socket) {
    char message[MESSAGE_MAX_BYTES];
    ssize_t length = recv(socket, message, sizeof message - 1, 0);
    if (length < 0)
        return errno == EINTR;
    if (length == 0)
        return false;
    message[length] = 0;
    if (!strcmp(message, "done"))
        _exit(EXIT_DONE);
    if (!strncmp(message, "refused ", 8))
        leave(EXIT_REFUSED, message + 8);
    if (!strncmp(message, "job ", 4) && is_word(message + 4))
        strcpy(job, message + 4);
    return true; /* what a newer pjwd may say besides is no matter of ours */
}

static void asked_to_end(int signals, int socket) {
    struct signalfd_siginfo info;
    if (read(signals, &info, sizeof info) != sizeof info)
        return;
    is_ending = true;
    if (socket >= 0)
        say(socket, "end");
    else if (!strcmp(job, "-"))
        _exit(EXIT_DONE);
}

static void read_arguments(int argc, char **argv) {
    if (argc != 4)
        leave(EXIT_ARGUMENTS, "usage: pjw-hold SOCKET SHAPE UUID");
    if (strlen(argv[1]) >= sizeof pjwd.sun_path)
        leave(EXIT_ARGUMENTS, "the path of the socket is too long");
    strcpy(pjwd.sun_path, argv[1]);
    shape = argv[2];
    uuid = argv[3];
    slurm_job = getenv("SLURM_JOB_ID");
    if (!slurm_job || !is_word(slurm_job) || strspn(slurm_job, "0123456789") != strlen(slurm_job))
        leave(EXIT_ARGUMENTS, "no SLURM_JOB_ID: this program is for Slurm to run");
    if (!is_word(shape) || !is_word(uuid))
        leave(EXIT_ARGUMENTS, "a shape and a uuid are one printable word each");
}

int main(int argc, char **argv) {
    read_arguments(argc, argv);
    syscall(SYS_close_range, (unsigned)STDERR_FILENO + 1, ~0U, 0U);
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    sigset_t ends;
    sigemptyset(&ends);
    sigaddset(&ends, SIGTERM);
    sigaddset(&ends, SIGINT);
    sigaddset(&ends, SIGHUP);
    sigprocmask(SIG_SETMASK, &ends, NULL);
    int signals = signalfd(-1, &ends, SFD_CLOEXEC);
    if (signals < 0)
        leave(EXIT_NO_PJWD, "cannot wait for signals");
    begun_ms = now_ms();

    long long away_since = begun_ms;
    int pause = PAUSE_MS, socket = -1;
    for (;;) {
        if (socket < 0 && (socket = connected()) >= 0)
            pause = PAUSE_MS;
        if (socket < 0 && now_ms() - away_since > AWAY_MAX_MS)
            leave(EXIT_NO_PJWD, "no pjwd of a gateway answers on this node");
        struct pollfd waiting[] = {{.fd = signals, .events = POLLIN}, {.fd = socket, .events = POLLIN}};
        /* without a pjwd this is the pause before the next attempt: nobody tells us when it is back */
        if (poll(waiting, 2, socket < 0 ? pause : -1) < 0)
            continue;
        if (waiting[0].revents)
            asked_to_end(signals, socket);
        if (socket < 0) {
            pause = pause * 2 < PAUSE_MAX_MS ? pause * 2 : PAUSE_MAX_MS;
        } else if (waiting[1].revents && !heard(socket)) {
            close(socket);
            socket = -1;
            away_since = now_ms();
        }
    }
}
