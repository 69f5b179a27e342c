/* The program for archives (../archive): started as the job's user, and within the job; and the meaning of its messages. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { WORDS_BYTES_MAX = 320 };
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

/*
 * Files that a client has uploaded for a job: unpacked before its command starts, by the program that unpacks archives
 * (../archive), as the job's user, in the job's namespaces, cgroup and system call filter. No other process reads the
 * archive.
 */

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

/*
 * The job's artifacts: packed after the command has ended and all else in the job with it, by the program for archives
 * (../archive), as the job's user, in the job's namespaces, cgroup and system call filter.
 *
 * The end is recorded by then, so nothing here can lose it. The archive is whole, or it is not there: it is on the disk
 * before its mode says that it is whole, and no process of the job has its descriptor any more then. A failure leaves an
 * empty file.
 */

enum { KEEP_SECONDS = 600, EXIT_NOTHING = 3 }; /* the latter as in ../archive/archive.h */
enum { WHOLE_MODE = 0400 };                    /* as in worker/state_dir.py */

enum outcome { OUTCOME_WHOLE, OUTCOME_NOTHING, OUTCOME_FAILED, OUTCOME_STOPPED, OUTCOME_LATE, OUTCOME_KILLED };
static const char *const OUTCOME_NAMES[] = {"whole", "nothing", "failed", "stopped", "late", "killed"};

static bool make_whole(int fd) {
    return fsync(fd) == 0 && fchmod(fd, WHOLE_MODE) == 0 && fsync(fd) == 0;
}

static enum outcome pack(const struct options *options, int signals, uid_t owner, char *words) {
    static char said[SAID_BYTES_MAX + 1];
    char *argv[] = {"pjw-archive", "collect", NULL};
    struct outputs no_outputs = {0};
    struct input no_input = {.file = -1, .watch = -1, .pipe = -1, .feed = FEED_OVER};
    struct control no_control = {.file = -1, .watch = -1};
    /* a file and not a pipe, which some process would have to read while we wait */
    int said_fd = memfd_create("pjw-said", MFD_CLOEXEC);
    if (said_fd < 0 || lseek(options->patterns_fd, 0, SEEK_SET) < 0)
        fail(STEP_OUTPUT, NULL);
    take_back();
    pid_t pid =
        start_archive_program(options, argv, options->patterns_fd, options->artifacts_fd, said_fd, options->output_max);
    keep_only_kill(owner, false);
    int timer = open_timer(KEEP_SECONDS);
    struct ending ending = run_job(options, &no_outputs, &no_input, &no_control, signals, timer, pid);
    if (ending.reason == REASON_TIMED_OUT)
        return OUTCOME_LATE;
    if (ending.reason != REASON_NONE || ending.killed_after_end)
        return OUTCOME_STOPPED;
    if (WIFEXITED(ending.wait_status) && WEXITSTATUS(ending.wait_status) == EXIT_NOTHING)
        return OUTCOME_NOTHING;
    /* by the kernel, as the job's memory does not suffice; or by hand */
    if (WIFSIGNALED(ending.wait_status) && WTERMSIG(ending.wait_status) == SIGKILL)
        return OUTCOME_KILLED;
    off_t end = lseek(said_fd, 0, SEEK_END), begin = end > SAID_BYTES_MAX ? end - SAID_BYTES_MAX : 0;
    if (pread(said_fd, said, SAID_BYTES_MAX, begin) >= 0)
        judge_archive(said, ending.wait_status, words, WORDS_BYTES_MAX);
    if (!WIFEXITED(ending.wait_status) || WEXITSTATUS(ending.wait_status) != 0)
        return OUTCOME_FAILED;
    if (make_whole(options->artifacts_fd))
        return OUTCOME_WHOLE;
    snprintf(words, WORDS_BYTES_MAX, "cannot write the archive: %s", strerror(errno));
    return OUTCOME_FAILED;
}

void keep_artifacts(const struct options *options, const struct ending *ended, int signals, uid_t owner) {
    char words[WORDS_BYTES_MAX] = "";
    bool stopped = ended->reason == REASON_STOPPED || ended->killed_after_end;
    record_failures(options->status_fd);
    enum outcome outcome = stopped ? OUTCOME_STOPPED : pack(options, signals, owner, words);
    if (outcome != OUTCOME_WHOLE)
        (void)!ftruncate(options->artifacts_fd, 0);
    record_artifacts(options->status_fd, OUTCOME_NAMES[outcome], words);
}
