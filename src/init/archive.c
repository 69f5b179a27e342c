/* The program for archives (../archive): started as the job's user, and within the job; and the meaning of its messages. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { TOOL_FD_LEAST = 4 }; /* 3 is where start_command() has the command's errors */

pid_t start_archive_program(const struct options *options, char **argv, int stdin_fd, int stdout_fd, int said_fd,
                            uint64_t file_bytes_max) {
    char *environment[] = {NULL};
    struct options archiving = *options;
    archiving.argv = argv;
    archiving.environment = environment;
    archiving.workdir = options->workspace ? WORKSPACE_DIRECTORY : NULL; /* where the command begins by itself */
    archiving.terminal = false;
    archiving.file_bytes_max = file_bytes_max;
    archiving.tool_fd = fcntl(options->archive_fd, F_DUPFD_CLOEXEC, TOOL_FD_LEAST);
    if (archiving.tool_fd < 0)
        fail(STEP_DESCRIPTORS, NULL);
    pid_t pid = start_command(&archiving, stdin_fd, stdout_fd, said_fd);
    close(archiving.tool_fd);
    return pid;
}

/* The last line that begins with *before*, without that. */
static const char *line_after(char *said, const char *before) {
    const char *found = NULL;
    size_t length = strlen(before);
    for (char *line = strtok(said, "\n"); line; line = strtok(NULL, "\n"))
        if (strncmp(line, before, length) == 0)
            found = line + length;
    return found;
}

/* A name in the middle may be too long; the failed operation and the reason are at the ends. */
static void shorten(const char *line, char *words, size_t words_bytes) {
    static const char GAP[] = "...";
    size_t length = strlen(line), half = (words_bytes - sizeof GAP) / 2;
    if (length < words_bytes)
        memcpy(words, line, length + 1);
    else
        snprintf(words, words_bytes, "%.*s%s%s", (int)half, line, GAP, line + length - half);
}

void judge_archive(char *said, int wait_status, char *words, size_t words_bytes) {
    bool failed = !WIFEXITED(wait_status) || WEXITSTATUS(wait_status) != 0;
    const char *line = line_after(said, failed ? "error: " : "note: ");
    if (line)
        shorten(line, words, words_bytes);
    else if (WIFSIGNALED(wait_status))
        snprintf(words, words_bytes, "signal %d has killed the program for archives", WTERMSIG(wait_status));
    else if (failed)
        snprintf(words, words_bytes, "the program for archives ended with %d", WEXITSTATUS(wait_status));
    else
        *words = '\0';
}
