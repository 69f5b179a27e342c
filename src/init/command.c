/* Starts the command: everything between fork and exec. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_close_range
#define SYS_close_range 436
#endif
enum { ERRORS_FD = 3, TOOL_FD };

struct failure {
    enum step step;
    int error;
};

/* getenv(3) would look into our own environment, which is not the command's. */
static const char *path_of(char **environment) {
    for (; *environment; environment++)
        if (strncmp(*environment, "PATH=", 5) == 0)
            return *environment + 5;
    return NULL;
}

/*
 * As execvp(3): the first candidate that can be executed; EACCES is remembered, absence is skipped. But a
 * file without a format that the kernel knows is an error, never a script for /bin/sh.
 */
static void search_and_execute(char **argv, char **environment) {
    static char candidate[PATH_MAX];
    const char *name = argv[0], *directory = path_of(environment);
    int error = ENOENT;
    if (strchr(name, '/')) {
        execve(name, argv, environment);
        return;
    }
    if (!directory)
        directory = "/bin:/usr/bin"; /* confstr(_CS_PATH) */
    for (;;) {
        size_t length = strcspn(directory, ":"), name_length = strlen(name);
        if (length + name_length + 2 <= sizeof candidate) {
            memcpy(candidate, directory, length);
            if (length) /* an empty element is the current directory */
                candidate[length] = '/';
            memcpy(candidate + length + (length > 0), name, name_length + 1);
            execve(candidate, argv, environment);
            if (errno == EACCES)
                error = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR)
                return;
        } else if (error == ENOENT) {
            error = ENAMETOOLONG;
        }
        if (!directory[length])
            break;
        directory += length + 1;
    }
    errno = error;
}

/* In the child, which shares init's memory until the exec; gives the step that failed, with errno.
 * its report goes to `errors_fd`. */
static enum step execute(const struct options *options, int stdin_fd, int stdout_fd, int stderr_fd, int *errors_fd) {
    if (stdin_fd < 0)
        stdin_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
    /* none of these is one of 0 to 2: main() has seen to it that those are open */
    if (stdin_fd < 0 || dup2(stdin_fd, 0) < 0 || dup2(stdout_fd, 1) < 0 || dup2(stderr_fd, 2) < 0)
        return STEP_STDIO;
    if (setsid() < 0)
        return STEP_SESSION;
    if (options->terminal && ioctl(0, TIOCSCTTY, 0) < 0)
        return STEP_CONTROLLING;
    /*
     * When the host runs out of memory, the kernel kills jobs before other processes. Set while privileged, this is
     * also the least that the command may ask for later (oom_score_adj_min, fs/proc/base.c).
     */
    if (set_oom_score_adj("500") < 0)
        return STEP_OOM_SCORE;
    /* not even the command can raise it again */
    struct rlimit files = {options->file_bytes_max, options->file_bytes_max};
    if (options->file_bytes_max && setrlimit(RLIMIT_FSIZE, &files) < 0)
        return STEP_LIMITS;
    umask(022);
    enum step failed = become_user(options->uid, options->gid);
    if (failed)
        return failed;
    /*
     * Closed and not only marked: a path of the client's may name them (/proc/self/fd), and one that is a
     * directory would lead to the host's tree as it was before our mounts.
     */
    if (dup3(*errors_fd, ERRORS_FD, O_CLOEXEC) < 0) /* never the same: it is the higher one of two above 2 */
        return STEP_DESCRIPTORS;
    *errors_fd = ERRORS_FD;
    bool has_tool = options->tool_fd >= 0;
    if (has_tool && options->tool_fd != TOOL_FD && dup3(options->tool_fd, TOOL_FD, O_CLOEXEC) < 0)
        return STEP_DESCRIPTORS;
    if (syscall(SYS_close_range, ERRORS_FD + 1U + has_tool, ~0U, 0U) < 0)
        return STEP_DESCRIPTORS;
    /* also before the client's own: /proc/self/cwd would be where the launcher was started */
    if (chdir("/run/job") < 0)
        return STEP_CHDIR;
    if (options->workdir && chdir(options->workdir) < 0)
        return STEP_WORKDIR;
    sigset_t none;
    sigemptyset(&none);
    if (sigprocmask(SIG_SETMASK, &none, NULL) < 0)
        return STEP_SIGNALS;
    if (filter_system_calls() < 0) /* from here on only execve(2), and the write(2) that says why it failed */
        return STEP_SECCOMP;
    if (has_tool) /* by its descriptor: the job may see no program at all, and not the directory that ours is in */
        syscall(SYS_execveat, TOOL_FD, "", options->argv, options->environment, AT_EMPTY_PATH);
    else
        search_and_execute(options->argv, options->environment);
    return STEP_EXEC;
}

/*
 * Whether a child has executed a program, though it may have ended since; 0, or -1 and errno. The end of the pipe does
 * not tell, since it also comes when the child is killed. The flags of the process do (proc_pid_stat(5)), also those of
 * a zombie: PF_FORKNOEXEC of linux/sched.h, "forked but didn't exec" to ps(1) and AFORK to acct(5). The kernel clears
 * it just before it closes the close-on-exec descriptors (begin_new_exec() in fs/exec.c).
 */
static int check_executed(pid_t pid) {
    enum { FLAGS_FIELD = 9, NAME_FIELD = 2, FORKED_NO_EXEC = 0x40 };
    char text[512];
    snprintf(text, sizeof text, "/proc/%d/stat", (int)pid);
    int fd = open(text, O_RDONLY | O_CLOEXEC);
    ssize_t got = fd < 0 ? -1 : read(fd, text, sizeof text - 1);
    int error = errno;
    if (fd >= 0)
        close(fd);
    text[got > 0 ? got : 0] = '\0';
    char *field = strrchr(text, ')'); /* the last one ends the name, which may have others in it */
    for (int i = NAME_FIELD; field && i < FLAGS_FIELD; i++)
        field = strchr(field + 1, ' ');
    bool executed = field && !(strtoul(field + 1, NULL, 10) & FORKED_NO_EXEC);
    errno = got < 0 ? error : ESRCH;
    return executed ? 0 : -1;
}

pid_t start_command(const struct options *options, int stdin_fd, int stdout_fd, int stderr_fd) {
    int errors[2];
    struct failure failure;
    if (pipe2(errors, O_CLOEXEC) < 0)
        fail(STEP_FORK, NULL);
    begin(options, STEP_EXEC, options->argv[0]);
#ifdef __SANITIZE_ADDRESS__
    pid_t pid = fork(); /* a sanitizer's own bookkeeping does not survive shared memory */
#else
    pid_t pid = vfork();
#endif
    if (pid < 0)
        fail(STEP_FORK, NULL);
    if (pid == 0) {
        int errors_fd = errors[1]; /* of our own: init, whose memory this is, has another */
        failure.step = execute(options, stdin_fd, stdout_fd, stderr_fd, &errors_fd);
        failure.error = errno;
        if (write(errors_fd, &failure, sizeof failure) < 0)
            _exit(1);
        _exit(0);
    }
    close(errors[1]);
    ssize_t got = read(errors[0], &failure, sizeof failure);
    if (got == sizeof failure) {
        errno = failure.error;
        fail(failure.step, failure.step == STEP_EXEC      ? options->argv[0]
                           : failure.step == STEP_WORKDIR ? options->workdir
                                                          : NULL);
    }
    close(errors[0]);
    if (check_executed(pid) < 0)
        fail(STEP_EXECUTED, NULL);
    return pid;
}
