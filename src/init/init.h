/*
 * pjw-init: PID 1 of one job. It makes the job's namespaces and mounts, gives up privilege, starts the
 * command, moves its output from a pipe to a file, ends what the command leaves behind, and records the end.
 *
 * It trusts its options and descriptors (the launcher, root, made them) and nothing that the job does.
 * It links nothing but libc and can be tried from a root shell: pjw-init --uid 1000 --gid 1000 -- echo hi
 * By hand, without meson:
 *   gcc -std=gnu17 -Wall -Wextra -Werror -Os -static -ffunction-sections -Wl,--gc-sections -o pjw-init *.c
 */
#ifndef PJW_INIT_H
#define PJW_INIT_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <signal.h>
#include <sys/types.h>

enum {
    IMAGE_FDS_MAX = 2,
    HIDES_MAX = 64,
    PLACES_MAX = 128,
    MOUNTS_MAX = PLACES_MAX + 3,
    CGROUPS_MAX = 16,
    LIFTS_MAX = 64,
    COMMAND_MAX_BYTES = (1 << 20) + (1 << 16),
    ORDER_MAX_BYTES = 1 << 16,
    STREAMS_MAX = 2
};
/* of the operator's directories: of one job; and bytes of a path where it has one */
enum { JOB_MOUNTS_MAX = 8, TARGET_MAX_BYTES = 255 };
/* of devices, and their files, of one job */
enum { JOB_DEVICES_MAX = 128, TARGETS_MAX = JOB_MOUNTS_MAX + JOB_DEVICES_MAX };
/* where a job has its workspace, if it has one */
#define WORKSPACE_DIRECTORY "/run/workspace"
/* of a job with names on the network: that of the proxy, and of each name with a port */
enum { LISTENERS_MAX = 17, HOST_MAX_BYTES = 253 };
enum { REQUEST_MAX_BYTES = 1 << 20, REQUEST_FDS_MAX = 1 + IMAGE_FDS_MAX + CGROUPS_MAX + LIFTS_MAX };

/* Every step that can fail: its name, and its words, which follow "cannot". Both are in a report. */
/* clang-format off */
#define STEPS(X)                                                        \
    X(OPTIONS, "options", "understand the options")                     \
    X(COMMAND, "command", "read the command")                           \
    X(LIMITS, "limits", "set the resource limits")                      \
    X(CLONE, "clone", "clone into new namespaces")                      \
    X(STAGE0, "stage0", "hear from the first stage")                    \
    X(CGROUP, "enter-cgroup", "enter the cgroup")                       \
    X(REQUEST, "request", "read the request")                           \
    X(ORDER, "order", "read the order")                                 \
    X(ENTER, "enter", "enter the namespaces")                           \
    X(CGROUP_NS, "unshare-cgroup", "make a cgroup namespace")           \
    X(KEYRING, "session-keyring", "make a session keyring")             \
    X(HOSTNAME, "hostname", "set the host name")                        \
    X(LOOPBACK, "loopback", "bring up the loopback interface")          \
    X(LINK, "link", "join the network of the job that it is linked to") \
    X(LISTEN, "listen", "listen at")                                    \
    X(SCRATCH, "open-scratch", "open the scratch directory")            \
    X(ROOT, "root", "make the root of the job")                         \
    X(SHOW, "show", "show")                                             \
    X(MOUNT_BASE, "mount-base", "mount the base of the rest at")        \
    X(MOUNT_RUN, "mount-run", "mount /run")                             \
    X(MOUNT_SCRATCH, "mount-scratch", "mount the scratch directory at") \
    X(MOUNT_WORKSPACE, "mount-workspace", "mount the workspace at")     \
    X(OVERLAY, "overlay", "mount the overlay of the image")             \
    X(IMAGE, "image", "use the image: it needs a directory, and no link, at") \
    X(MOUNT_SOURCE, "mount-source", "open the directory of the mount")  \
    X(MOUNT_AT, "mount-at", "mount the operator's directory at")        \
    X(DEVICE_AT, "device-at", "give the job")                           \
    X(MOUNT_TMP, "mount-tmp", "mount a private")                        \
    X(MOUNT_DEV, "mount-dev", "mount /dev")                             \
    X(DEVICE, "make-device", "make")                                    \
    X(MOUNT_PROC, "mount-proc", "mount /proc")                          \
    X(MOUNT_SYS, "mount-sys", "mount /sys")                             \
    X(NAMES, "names", "make the job's own")                             \
    X(HIDE, "hide", "hide")                                             \
    X(SIGNALFD, "signalfd", "make a signalfd")                          \
    X(TIMER, "timer", "set the timer")                                  \
    X(OUTPUT, "output", "use the output descriptor")                    \
    X(INPUT, "input", "watch the input descriptor")                     \
    X(CONTROL, "control", "watch the control descriptor")               \
    X(PIPE, "pipe", "make a pipe")                                      \
    X(TERMINAL, "terminal", "make a terminal")                          \
    X(STDIO, "stdio", "set up standard input and output")               \
    X(FORK, "fork", "start a process")                                  \
    X(SESSION, "setsid", "start a session")                             \
    X(CONTROLLING, "controlling-terminal", "take the terminal")         \
    X(OOM_SCORE, "oom-score", "set oom_score_adj")                      \
    X(BOUNDING_SET, "bounding-set", "drop the capability bounding set") \
    X(GROUPS, "setgroups", "drop the supplementary groups")             \
    X(GID, "setgid", "set the group id")                                \
    X(UID, "setuid", "set the user id")                                 \
    X(CAPABILITIES, "capabilities", "drop capabilities")                \
    X(NO_NEW_PRIVS, "no-new-privs", "set no_new_privs")                 \
    X(SIGNALS, "signals", "reset the signal mask")                      \
    X(DESCRIPTORS, "descriptors", "close other descriptors")            \
    X(CHDIR, "chdir", "enter /run/job")                                 \
    X(WORKDIR, "workdir", "enter")                                      \
    X(SECCOMP, "seccomp", "install the system call filter")             \
    X(UNPACK, "unpack", "unpack the upload:")                           \
    X(EXEC, "exec", "execute")                                          \
    X(EXECUTED, "executed", "see the command reach its exec")           \
    X(CONNECT, "connect", "connect to the port")                        \
    X(STATUS, "status", "write the status file")
/* clang-format on */

enum step {
    STEP_NONE,
#define STEP_NAME(id, name, words) STEP_##id,
    STEPS(STEP_NAME)
#undef STEP_NAME
};

enum reason { REASON_NONE, REASON_STOPPED, REASON_TIMED_OUT, REASON_OUTPUT_LIMIT, REASON_OUTPUT_FAILED };

/* A path of the host's: shown by an overlay or by a bind mount, or covered by an empty directory. */
struct place {
    char *path;
    enum view { VIEW_OVERLAY, VIEW_BIND, VIEW_COVER } view;
    int fd; /* root.c's */
};

enum source_kind { SOURCE_READ_ONLY, SOURCE_WRITABLE, SOURCE_DEVICE, SOURCE_FILE };

/* A directory that the operator offers, a device, or a file or directory that comes with one. */
struct source {
    const char *path;
    enum source_kind kind;
};

/* Where a job has one, and a mount of it. */
struct target {
    const char *path;
    int fd;
    bool of_device;
};

/* An address in the job that takes its connections to names; pjwd-egress makes them outside. */
struct listener {
    uint32_t address; /* in the order of the network, as the port */
    uint16_t port;
    char host[HOST_MAX_BYTES + 1]; /* whose address this is for the job; empty: the proxy's */
};

/* options.c; a descriptor that was not given is -1, a number 0, a string NULL */
struct options {
    bool tells;   /* name on stderr each step that may wait for a file system, before it begins */
    bool spawner; /* not for an init: be the process that clones them (spawner.c) */
    bool waits;   /* for an order with the rest: the user, the limits, the command, the files */
    int report_fd, status_fd, cgroup_fd;
    int output_fds[STREAMS_MAX], times_fds[STREAMS_MAX]; /* of stdout, and of stderr where that is kept apart */
    bool split_stderr;
    bool input; /* the order comes with a descriptor of the input */
    int input_fd;
    int enter_fd;  /* a pidfd of the init of a running job: make a session in that job (session.c) */
    bool terminal; /* the command's stdin, stdout and stderr are a terminal; its size is in the control file */
    int tool_fd;   /* the program to execute, whatever the command's first word is; -1: the command's own */
    bool upload;   /* the order comes with an archive of files for the job */
    int upload_fd;
    bool workspace; /* the order comes with a mount of it */
    int workspace_fd;
    struct target targets[TARGETS_MAX]; /* places of offered directories and devices; the order has mounts of these */
    int target_count;
    struct source sources[TARGETS_MAX]; /* not for an init: open these, and hand over mounts of them */
    int source_count;
    bool keep; /* the order comes with patterns of files that are kept after the end, and with a file for their archive */
    int patterns_fd, artifacts_fd;
    int archive_fd; /* the program that unpacks the one and packs the other; -1 where there is neither */
    bool tool;      /* the order comes with that program, and the command is its */
    bool image;     /* the job has its own root, and no file of the host */
    int image_fds[IMAGE_FDS_MAX],
        image_count; /* mounts of it: one that maps users, if there is one, and one that does not */
    bool image_read_only;
    uint64_t file_bytes_max; /* the most bytes of a file that the command writes; 0: any */
    uint16_t connect_port;   /* not for a command: connect to it in the job's network, and hand the socket over */
    struct listener listeners[LISTENERS_MAX];
    int listener_count;
    bool link; /* the order comes with the network namespace of another job, which this one shares */
    int link_fd;
    bool control; /* the order comes with a descriptor of the control file */
    int control_fd;
    int cgroup_procs_fds[CGROUPS_MAX];
    int cgroup_procs_count;
    int lift_fds[LIFTS_MAX];      /* the files of the cgroup that hold its limits of disk IO, one disk a line */
    const char *lifts[LIFTS_MAX]; /* the text that lifts one disk's limit in each of them */
    int lift_fds_count, lifts_count;
    uid_t uid;
    gid_t gid;
    const char *hostname, *scratch;
    char *variable; /* NAME=VALUE, in addition to our own environment */
    char *cgroup;   /* the job's cgroup directory, which the job sees; NULL with cgroup v1 */
    char *hides[HIDES_MAX];
    int hide_count;
    struct place places[PLACES_MAX]; /* parents before their children; the root is shown without it, too */
    int place_count;
    char *mounts[MOUNTS_MAX]; /* all mounts of the host that places, scratch or cgroup lie in; the root first */
    int mount_count;
    uint64_t tmp_bytes, output_max, time_max;
    uint64_t grace; /* seconds from SIGTERM to SIGKILL, when the SIGTERM is not the launcher's */
    char **argv, **environment;
    const char *workdir;         /* NULL: /run/job */
    size_t command_mapped_bytes; /* of argv when --command-fd gave it; the other pointers, and the strings, follow */
};
void parse_options(int argc, char **argv, struct options *options);
void forget_paths(struct options *options); /* also for readers of our command line in /proc */
/* The words of a request to the spawner, each ended by NUL: the command line of an init that waits. */
void parse_request(char *words, size_t length, struct options *options);
/*
 * The words of an order, each ended by NUL, and the descriptors that came with it: command, output, status,
 * times; where stderr is kept apart its own output and times; with --control that file; where there is input, that; with
 * --keep the file for artifacts; with --upload the archive; with --keep the patterns; with one of these two, or with --tool, the
 * program for archives; with --workspace a mount of it; for each --mount-at and --device-at a mount of that; last, with --link, a network
 * namespace. A session has no times, and no mounts but those of its job.
 */
enum { ORDER_FDS_MAX = 13 + TARGETS_MAX };
void parse_order(char *words, size_t length, const int *fds, size_t fd_count, struct options *options);
void release_command(struct options *options);

/* report.c */
void report_to(int fd);
/*
 * One datagram into *bytes*; gives its length, 0 when the other end is gone. Descriptors come along, at least one, and
 * nothing else. Fails with *step*.
 */
size_t receive(enum step step, int socket, char *bytes, size_t bytes_max, int *fds, size_t fds_max, size_t *fd_count);
void await_order(struct options *options);
void report_cloned(int pidfd);
void report_execed(int64_t realtime_ns);
void report_connected(int socket);
void report_opened(int tree);
void report_listening(const int *sockets, size_t count);
/* With --tell, name on stderr the step that init is about to take, so that a reader sees where init hangs. */
void begin(const struct options *options, enum step step, const char *subject);
/* Report the step with errno and its subject (may be NULL), or say it on stderr. */
void report_failed(enum step step, const char *subject);
/* The same, and _exit. */
_Noreturn void fail(enum step step, const char *subject);
int64_t realtime_ns(void);
void record_start(int status_fd, int64_t ns);
void record_end(int status_fd, int64_t ns, int wait_status, enum reason reason);
/* The result for the artifacts, in a word, and words for a person, which may be empty. */
void record_artifacts(int status_fd, const char *outcome, const char *words);
/* From now on a step that fails is the reason why there are no artifacts: fail() records it as that. */
void record_failures(int status_fd);

/* main.c: set the settings that an init inherits; and clone an init, whose pid it gives, or -1 and errno */
void prepare(const struct options *options);
pid_t spawn_init(struct options *options);

/* spawner.c; an init that was cloned by a spawner drops the spawner's descriptors, and shows a state to ps(1) */
_Noreturn void spawn_inits(int argc, char **argv);
void leave_spawner(const struct options *options);
void show_state(const struct options *options, const char *state);

/* privilege.c */
void set_inherited(void);

/* namespaces.c */
struct clone_args;
/* clone3(2) by its options, into the cgroup of the options where cgroups have a descriptor (v2) */
int clone_into_cgroup(struct clone_args *args, const struct options *options);
int clone_init(const struct options *options, int *pidfd);
int enter_cgroups(const struct options *options); /* gives an errno, 0 when in */
void join_keyring(void);
void enter_namespaces(const struct options *options);

/* network.c: share the network of another job; listen, and hand the sockets over by the report */
void join_network(const struct options *options);
void hand_over_listeners(const struct options *options);

/* session.c: another command in a job that runs */
bool is_session(const struct options *options);
pid_t clone_session(const struct options *options, int *pidfd);
void enter_job(const struct options *options);
/* The orders to init while it runs: the file that the server writes, as a whole. */
struct orders {
    uint16_t rows, columns, width, height; /* of a terminal: struct winsize of ioctl_tty(2) */
    uint32_t hang_up;                      /* whether the session is to end */
};
struct control {
    int file, watch; /* watch: of changes of the file; -1 where there is none */
    struct orders orders;
    bool hung_up; /* whether that order was obeyed */
};
void open_control(struct control *control, const struct options *options);
void read_orders(struct control *control);
_Noreturn void hand_over_connection(const struct options *options);

/* template.c; the spawner enters one for all its inits, and an init by hand makes its own mount namespace into one */
void enter_template(const struct options *options);
void make_template(const struct options *options);
bool is_in_template(void);

/* mounts.c; the second when the order is known */
void make_mounts(struct options *options);
void finish_mounts(struct options *options);

/* offered.c: the operator's directories and devices, opened by a process that does nothing else, and attached in a job */
_Noreturn void hand_over_sources(const struct options *options);
void mount_offered(const struct options *options);

/* privilege.c */
int set_oom_score_adj(const char *value);
void bound_to_kill(void); /* the bounding set, while still privileged */
/*
 * The capabilities of init itself. If it is to start another program at the end, it can take back those needed for that,
 * once.
 */
void keep_only_kill(uid_t output_owner, bool starts_another);
void take_back(void);
enum step become_user(uid_t uid, gid_t gid); /* the command: gives the step that failed */

/* seccomp.c; after no_new_privs, and last before the exec: later calls must pass the filter */
int filter_system_calls(void);

/*
 * archive.c: the program for archives, as the job's user and within the job. It writes to *said_fd*, a file or a pipe, the
 * names that it left out and why it failed. Gives its pid.
 */
pid_t start_archive_program(const struct options *options, char **argv, int stdin_fd, int stdout_fd, int said_fd,
                            uint64_t file_bytes_max);
enum { SAID_BYTES_MAX = 8192 };
/* Into *words*: its last message about its failure or, without one, about files left out. Changes *said*. */
void judge_archive(char *said, int wait_status, char *words, size_t words_bytes);

/* archive.c: unpack an upload, as the job's user and within the job; a failure is reported, and ends init */
void unpack_upload(const struct options *options);

/* archive.c: after the end was recorded, pack the job's artifacts. Nothing that happens here changes the end. */
struct ending;
void keep_artifacts(const struct options *options, const struct ending *ended, int signals, uid_t owner);

/* command.c; gives the command's pid, which has been executed; a stdin of -1 is an empty one */
pid_t start_command(const struct options *options, int stdin_fd, int stdout_fd, int stderr_fd);

/*
 * output.c: when output was written. A record says that all up to an offset had been read at a moment; it is
 * written at once, unless the one before it is young: then both are one.
 */
struct time_record {
    int64_t ns;   /* CLOCK_REALTIME */
    uint64_t end; /* the place in the file where the bytes read until then end */
};
struct times {
    int fd; /* -1: times are not recorded */
    uint64_t count;
    struct time_record held; /* not yet written; of an end of 0: none */
    uint64_t end;
    int64_t written_ns, retry_ns;
};
struct times open_times(int fd, uint64_t end);
void note_time(struct times *times, int64_t ns, size_t bytes);
/* Drop all records. Later records are for a file that has *end* bytes now. */
void forget_times(struct times *times, uint64_t end);
/* Milliseconds until `write_held_time` has something to do; -1: nothing is held. */
int held_time_ms(const struct times *times);
void write_held_time(struct times *times, bool at_once);

/* output.c */
enum flow {
    FLOW_MORE,   /* moved something, there may be more */
    FLOW_EMPTY,  /* the pipe is empty for now */
    FLOW_FULL,   /* the reader of our output (a pipe, a terminal) has to catch up */
    FLOW_HELD,   /* the file takes no more for now: no space */
    FLOW_OVER,   /* the job has written more than it may */
    FLOW_FAILED, /* the file can never be written again */
    FLOW_END,    /* no process can write to the pipe any more */
};
struct output {
    int pipe, file;
    int slave; /* of a terminal, whose master `pipe` is then: open until the command has ended, lest that look closed before */
    uid_t owner;
    bool regular;   /* the file: it has an end to write from, and never makes us wait for a reader */
    off_t end;      /* of a regular file: where the next byte goes */
    mode_t mode;    /* of the file, without the sticky bit that notes that output waits */
    bool held;      /* whether the sticky bit is set */
    bool over;      /* the job has written more than it may; nothing is read after that */
    uint64_t *left; /* bytes that the job may still write, to any of its streams */
    char *buffer;
    size_t start, pending; /* of the bytes that were read and are not yet written */
    enum flow flow;
    int64_t read_ns; /* when that was read */
    struct times times;
};
enum { PIPE_BYTES = 1 << 20 }; /* the most bytes in an output pipe */
struct outputs {
    int count;
    uint64_t left;
    struct output streams[STREAMS_MAX];
};
void open_outputs(struct outputs *outputs, const struct options *options, int write_ends[STREAMS_MAX]);
/* session.c: gives the master, and the end for the command */
int open_terminal(const struct options *options, int *slave);
void resize_terminal(int master, const struct orders *orders);
enum flow move_output(struct output *output);
/* Note whether another process has cut the file short; for the end, when the job writes nothing more. */
void check_end(struct output *output);

/* input.c */
enum feed {
    FEED_MORE, /* the pipe has to take more */
    FEED_DRY,  /* the file has no more for now */
    FEED_HELD, /* the file cannot be read for now */
    FEED_OVER, /* all was fed, the command reads no more, or there never was any */
};
struct input {
    int file, watch, pipe; /* watch: of changes of the file */
    bool terminal;         /* whether the pipe is a terminal: see type_input() */
    off_t typed;
    char last;
    enum feed feed;
};
void open_input(struct input *input, const struct options *options, const struct output *output, int *read_end);
void feed_input(struct input *input);
/* Watch a file for changes, by an inotify instance that counts as *uid*'s; -1 and errno. */
int watch_file(int file, uid_t uid);

/*
 * reap.c. The signals that init is sent. By the launcher: SIGQUIT, which ends the job with SIGKILL, and
 * SIGNAL_FIRST + n, which does so with signal n (1 to 31), since a signal carries no number that Python could
 * give it. By others, such as systemd when the host goes down: SIGTERM, which ends the job with SIGTERM, and
 * with SIGKILL after a grace period. No process of the job may send a signal to init: it is of another user, and
 * has no capabilities. ENTERED says that a session may be in the job from now on: its processes are none of init's children.
 */
enum { SIGNAL_FIRST = 33, SIGNAL_LAST = SIGNAL_FIRST + 31, ENTERED = SIGUSR1 };
struct ending {
    int wait_status;
    int64_t ended_ns;
    enum reason reason;
    bool killed_after_end; /* by a caller that waits for the job's end, and for no more of its output */
};
int open_signals(const struct options *options);
struct ending run_job(const struct options *options, struct outputs *outputs, struct input *input, struct control *control,
                      int signals, int timer, pid_t command);
int open_timer(uint64_t seconds);

#endif
