/*
 * Files that a client has uploaded for a job: unpacked before its command starts, by the program that unpacks archives
 * (../archive), as the job's user, in the job's namespaces, cgroup and system call filter. No other process reads the
 * archive.
 */
#include "init.h"

#include <errno.h>
#include <string.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORDS_BYTES_MAX = 320 };

/* To its end, as far as there is room; the beginning is dropped. */
static void read_said(int fd, char *said) {
    size_t used = 0;
    for (;;) {
        if (used == SAID_BYTES_MAX) {
            memmove(said, said + SAID_BYTES_MAX / 2, SAID_BYTES_MAX / 2);
            used = SAID_BYTES_MAX / 2;
        }
        ssize_t got = read(fd, said + used, SAID_BYTES_MAX - used);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            break;
        used += (size_t)got;
    }
    said[used] = '\0';
}

void unpack_upload(const struct options *options) {
    static char said[SAID_BYTES_MAX + 1];
    char words[WORDS_BYTES_MAX];
    char *argv[] = {"pjw-archive", "unpack", "", ".", NULL};
    int ends[2], status, null = open("/dev/null", O_WRONLY | O_CLOEXEC);
    if (null < 0 || pipe2(ends, O_CLOEXEC) < 0)
        fail(STEP_UNPACK, NULL);
    pid_t pid = start_archive_program(options, argv, options->upload_fd, null, ends[1], 0);
    close(ends[1]);
    close(null);
    close(options->upload_fd);
    read_said(ends[0], said);
    close(ends[0]);
    while (waitpid(pid, &status, 0) < 0)
        if (errno != EINTR)
            fail(STEP_UNPACK, NULL);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0)
        return;
    judge_archive(said, status, words, sizeof words);
    errno = 0; /* the words say it all */
    fail(STEP_UNPACK, words);
}
