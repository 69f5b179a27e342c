/*
 * The job's artifacts: packed after the command has ended and all else in the job with it, by the program for archives
 * (../archive), as the job's user, in the job's namespaces, cgroup and system call filter.
 *
 * The end is recorded by then, so nothing here can lose it. The archive is whole, or it is not there: it is on the disk
 * before its mode says that it is whole, and no process of the job has its descriptor any more then. A failure leaves an
 * empty file.
 */
#include "init.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { KEEP_SECONDS = 600, WORDS_BYTES_MAX = 320, EXIT_NOTHING = 3 }; /* the latter as in ../archive/archive.h */
enum { WHOLE_MODE = 0400 };                                           /* as in worker/state_dir.py */

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
