/* Reads the command line and the command. Anything odd is refused: our caller is a program. */
#include "init.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* clang-format off */
enum option_id {
    REPORT_FD = 1, STATUS_FD, OUTPUT_FD, COMMAND_FD, CGROUP_FD, CGROUP_PROCS_FD, USER_ID, GROUP_ID, HOSTNAME,
    SCRATCH, HIDE, TMP_BYTES, OUTPUT_MAX, TIME_MAX, WAIT, SPLIT_STDERR, TIMES_FD, STDERR_FD, STDERR_TIMES_FD,
    INPUT, INPUT_FD, LIFT_FD, LIFT, VISIBLE, BOUND, COVER, TELL, GRACE, CGROUP, SPAWNER, VARIABLE, ENTER_FD, CONTROL,
    TERMINAL, CONNECT, TOOL_FD, UPLOAD, MOUNT, WORKSPACE, KEEP, IMAGE_FD, IMAGE_READ_ONLY, TOOL, MOUNT_AT, OPEN, OPEN_WRITABLE,
    LISTEN, LINK, DEVICE_AT, OPEN_DEVICE, OPEN_FILE,
};
/* clang-format on */

/* Where an option may come: an order has the facts that were not known before the job, and none about the host. */
enum phase { LINE = 256, ORDER = 512 };

static const struct option OPTIONS[] = {
    {"report-fd", required_argument, NULL, REPORT_FD | LINE},
    {"status-fd", required_argument, NULL, STATUS_FD | LINE},
    {"output-fd", required_argument, NULL, OUTPUT_FD | LINE},
    {"command-fd", required_argument, NULL, COMMAND_FD | LINE},
    {"cgroup-fd", required_argument, NULL, CGROUP_FD | LINE},
    {"cgroup", required_argument, NULL, CGROUP | LINE},
    {"cgroup-procs-fd", required_argument, NULL, CGROUP_PROCS_FD | LINE},
    {"uid", required_argument, NULL, USER_ID | LINE | ORDER},
    {"gid", required_argument, NULL, GROUP_ID | LINE | ORDER},
    {"hostname", required_argument, NULL, HOSTNAME | LINE},
    {"scratch", required_argument, NULL, SCRATCH | LINE},
    {"hide", required_argument, NULL, HIDE | LINE},
    {"visible", required_argument, NULL, VISIBLE | LINE},
    {"bound", required_argument, NULL, BOUND | LINE},
    {"cover", required_argument, NULL, COVER | LINE},
    {"mount", required_argument, NULL, MOUNT | LINE},
    {"tmp-bytes", required_argument, NULL, TMP_BYTES | LINE | ORDER},
    {"output-max", required_argument, NULL, OUTPUT_MAX | LINE | ORDER},
    {"time-max", required_argument, NULL, TIME_MAX | LINE | ORDER},
    {"grace", required_argument, NULL, GRACE | LINE | ORDER},
    {"wait", no_argument, NULL, WAIT | LINE},
    {"split-stderr", no_argument, NULL, SPLIT_STDERR | LINE | ORDER},
    {"times-fd", required_argument, NULL, TIMES_FD | LINE},
    {"stderr-fd", required_argument, NULL, STDERR_FD | LINE},
    {"stderr-times-fd", required_argument, NULL, STDERR_TIMES_FD | LINE},
    {"input", no_argument, NULL, INPUT | ORDER},
    {"input-fd", required_argument, NULL, INPUT_FD | LINE},
    {"lift-fd", required_argument, NULL, LIFT_FD | LINE},
    {"lift", required_argument, NULL, LIFT | LINE},
    {"tell", no_argument, NULL, TELL | LINE},
    {"spawner", no_argument, NULL, SPAWNER | LINE},
    {"variable", required_argument, NULL, VARIABLE | LINE},
    {"enter-fd", required_argument, NULL, ENTER_FD | LINE},
    {"connect", required_argument, NULL, CONNECT | LINE},
    {"tool-fd", required_argument, NULL, TOOL_FD | LINE},
    {"control", no_argument, NULL, CONTROL | ORDER},
    {"terminal", no_argument, NULL, TERMINAL | ORDER},
    {"upload", no_argument, NULL, UPLOAD | ORDER},
    {"workspace", no_argument, NULL, WORKSPACE | ORDER},
    {"keep", no_argument, NULL, KEEP | ORDER},
    {"image-fd", required_argument, NULL, IMAGE_FD | LINE},
    {"image-read-only", no_argument, NULL, IMAGE_READ_ONLY | LINE},
    {"tool", no_argument, NULL, TOOL | ORDER},
    {"mount-at", required_argument, NULL, MOUNT_AT | ORDER},
    {"open", required_argument, NULL, OPEN | LINE},
    {"open-writable", required_argument, NULL, OPEN_WRITABLE | LINE},
    {"listen", required_argument, NULL, LISTEN | LINE | ORDER},
    {"link", no_argument, NULL, LINK | ORDER},
    {"device-at", required_argument, NULL, DEVICE_AT | ORDER},
    {"open-device", required_argument, NULL, OPEN_DEVICE | LINE},
    {"open-file", required_argument, NULL, OPEN_FILE | LINE},
    {NULL, 0, NULL, 0},
};

static const char USAGE[] = "usage: pjw-init --uid N --gid N [OPTION]... [-- PROGRAM [ARG]...]";

static _Noreturn void refuse(const char *option, const char *value, const char *why) {
    dprintf(STDERR_FILENO, "pjw-init: cannot take --%s %s: %s\n%s\n", option, value, why, USAGE);
    errno = EINVAL;
    fail(STEP_OPTIONS, NULL);
}

static uint64_t number(const char *option, const char *text, uint64_t least, uint64_t most) {
    char *end;
    errno = 0;
    /* strtoull(3) alone would take " 1", "+1" and "-1" */
    bool digit = text[0] >= '0' && text[0] <= '9';
    unsigned long long value = digit ? strtoull(text, &end, 10) : 0;
    if (!digit || *end || errno)
        refuse(option, text, "not a whole number");
    if (value < least || value > most)
        refuse(option, text, "out of range");
    return value;
}

static int descriptor(const char *option, const char *text, int least) {
    int fd = (int)number(option, text, (uint64_t)least, INT_MAX);
    if (fcntl(fd, F_GETFD) < 0)
        refuse(option, text, "not an open descriptor");
    return fd;
}

static char *path(const char *option, char *text) {
    if (text[0] != '/')
        refuse(option, text, "not an absolute path");
    return text;
}

static void add_place(struct options *options, const char *option, enum view view) {
    if (options->place_count == PLACES_MAX)
        refuse(option, optarg, "too many of them");
    options->places[options->place_count++] = (struct place){path(option, optarg), view, -1};
}

static void add_source(struct options *options, const char *option, enum source_kind kind) {
    if (options->source_count == TARGETS_MAX)
        refuse(option, optarg, "too many of them");
    options->sources[options->source_count++] = (struct source){path(option, optarg), kind};
}

static void add_target(struct options *options, const char *option, bool of_device) {
    if (options->target_count == TARGETS_MAX || (!of_device && options->target_count >= JOB_MOUNTS_MAX))
        refuse(option, optarg, "too many of them");
    if (strlen(optarg) > TARGET_MAX_BYTES)
        refuse(option, optarg, "too long");
    if (!of_device && options->target_count && options->targets[options->target_count - 1].of_device)
        refuse(option, optarg, "devices come last");
    options->targets[options->target_count++] = (struct target){path(option, optarg), -1, of_device};
}

/* ADDRESS:PORT, and /HOST behind it where it stands for a host. */
static void add_listener(struct options *options, const char *option, char *text) {
    if (options->listener_count == LISTENERS_MAX)
        refuse(option, text, "too many of them");
    struct listener *listener = &options->listeners[options->listener_count++];
    struct in_addr address;
    char *colon = strchr(text, ':'), *slash = strchr(text, '/');
    if (!colon || (slash && slash < colon) || (slash && strlen(slash + 1) > HOST_MAX_BYTES))
        refuse(option, text, "not ADDRESS:PORT or ADDRESS:PORT/HOST");
    *colon = '\0';
    if (slash)
        *slash = '\0';
    if (inet_pton(AF_INET, text, &address) != 1)
        refuse(option, text, "not an address");
    listener->address = address.s_addr;
    listener->port = htons((uint16_t)number(option, colon + 1, 1, UINT16_MAX));
    strcpy(listener->host, slash ? slash + 1 : ""); /* the order's words are gone before it is used */
}

static _Noreturn void refuse_command(int error) {
    errno = error;
    fail(STEP_COMMAND, NULL);
}

static void *map(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        fail(STEP_COMMAND, NULL);
    return memory;
}

/* All of a file or pipe, whose last byte is a NUL. */
static char *read_strings(int fd, size_t *length) {
    char *text = map(COMMAND_MAX_BYTES + 1);
    bool seekable = true;
    *length = 0;
    while (*length <= COMMAND_MAX_BYTES) {
        size_t room = COMMAND_MAX_BYTES + 1 - *length;
        ssize_t got = seekable ? pread(fd, text + *length, room, (off_t)*length) : read(fd, text + *length, room);
        if (got < 0 && errno == ESPIPE && seekable) {
            seekable = false;
            continue;
        }
        if (got < 0)
            fail(STEP_COMMAND, NULL);
        if (got == 0)
            break;
        *length += (size_t)got;
    }
    if (*length > COMMAND_MAX_BYTES)
        refuse_command(E2BIG);
    if (*length == 0 || text[*length - 1] != '\0')
        refuse_command(EINVAL);
    return text;
}

static char *after(char *string) {
    return string + strlen(string) + 1;
}

static bool is_among(const char *variable, char *const *others, size_t count) {
    size_t name_length = strcspn(variable, "=") + 1; /* the "=" as well */
    for (size_t i = 0; i < count; i++)
        if (strncmp(variable, others[i], name_length) == 0)
            return true;
    return false;
}

/*
 * The working directory (or ""), the variables that are added to our environment (and --variable), "", the argv. One mapping, the
 * pointers before the strings, so that release_command() gives every page of it back.
 */
static void read_command(int fd, struct options *options) {
    size_t length, variables = 0, defaults = 0, arguments = 0;
    char *text = read_strings(fd, &length), *end = text + length, *string = after(text);
    for (; string < end && *string; string = after(string), variables++)
        if (*string == '=' || !strchr(string, '='))
            refuse_command(EINVAL);
    if (string >= end || (*text && *text != '/'))
        refuse_command(EINVAL);
    for (string++; string < end; string = after(string))
        arguments++;
    while (environ[defaults])
        defaults++;
    size_t pointers_bytes = (arguments + 1 + variables + defaults + !!options->variable + 1) * sizeof(char *);
    options->command_mapped_bytes = pointers_bytes + length;
    options->argv = map(options->command_mapped_bytes);
    string = memcpy((char *)options->argv + pointers_bytes, text, length);
    munmap(text, COMMAND_MAX_BYTES + 1);
    close(fd);

    options->workdir = *string ? string : NULL;
    string = after(string);
    char **variable = options->environment = options->argv + arguments + 1;
    for (; *string; string = after(string))
        *variable++ = string;
    for (size_t i = 0; i < defaults; i++)
        if (!is_among(environ[i], options->environment, variables))
            *variable++ = environ[i];
    if (options->variable && !is_among(options->variable, options->environment, variables))
        *variable++ = options->variable;
    string++;
    for (size_t i = 0; i < arguments; i++, string = after(string))
        options->argv[i] = string;
    if (!arguments || !*options->argv[0])
        refuse_command(EINVAL);
}

void release_command(struct options *options) {
    if (options->command_mapped_bytes)
        munmap(options->argv, options->command_mapped_bytes);
    options->argv = options->environment = NULL;
    options->workdir = NULL;
}

/* Gives the descriptor of the command, or -1; the words behind the options begin at `optind`. */
static int take_options(int argc, char **argv, enum phase phase, struct options *options) {
    int command_fd = -1, id, index = 0;
    optind = 0; /* getopt_long(3) begins anew */
    /* "+": the first word that is no option belongs to the command, whatever it looks like */
    while ((id = getopt_long(argc, argv, "+", OPTIONS, &index)) != -1) {
        const char *name = id == '?' ? "" : OPTIONS[index].name;
        if (id != '?' && !(id & phase))
            refuse(name, optarg ? optarg : "(none)", phase == ORDER ? "not in an order" : "only in an order");
        switch (id & ~(LINE | ORDER)) {
        case REPORT_FD: report_to(options->report_fd = descriptor(name, optarg, 0)); break;
        case STATUS_FD: options->status_fd = descriptor(name, optarg, 0); break;
        case OUTPUT_FD: options->output_fds[0] = descriptor(name, optarg, 0); break;
        case TIMES_FD: options->times_fds[0] = descriptor(name, optarg, 3); break;
        case STDERR_FD: options->output_fds[1] = descriptor(name, optarg, 0); break;
        case STDERR_TIMES_FD: options->times_fds[1] = descriptor(name, optarg, 3); break;
        case COMMAND_FD: command_fd = descriptor(name, optarg, 0); break;
        /* not 0 to 2, which tidy_standard_fds() may close */
        case CGROUP_FD: options->cgroup_fd = descriptor(name, optarg, 3); break;
        case CGROUP: options->cgroup = path(name, optarg); break;
        case CGROUP_PROCS_FD:
            if (options->cgroup_procs_count == CGROUPS_MAX)
                refuse(name, optarg, "too many of them");
            options->cgroup_procs_fds[options->cgroup_procs_count++] = descriptor(name, optarg, 3);
            break;
        /* (uid_t)-1 is "leave it" to setresuid(2): root */
        case USER_ID: options->uid = (uid_t)number(name, optarg, 1, UINT32_MAX - 1); break;
        case GROUP_ID: options->gid = (gid_t)number(name, optarg, 1, UINT32_MAX - 1); break;
        case HOSTNAME: options->hostname = optarg; break;
        case SCRATCH: options->scratch = path(name, optarg); break;
        case HIDE:
            if (options->hide_count == HIDES_MAX)
                refuse(name, optarg, "too many of them");
            options->hides[options->hide_count++] = path(name, optarg);
            break;
        case VISIBLE: add_place(options, name, VIEW_OVERLAY); break;
        case BOUND: add_place(options, name, VIEW_BIND); break;
        case COVER: add_place(options, name, VIEW_COVER); break;
        case MOUNT:
            if (options->mount_count == MOUNTS_MAX)
                refuse(name, optarg, "too many of them");
            if (!options->mount_count && strcmp(optarg, "/") != 0)
                refuse(name, optarg, "the root comes first");
            options->mounts[options->mount_count++] = path(name, optarg);
            break;
        case TMP_BYTES: options->tmp_bytes = number(name, optarg, 0, INT64_MAX); break;
        case OUTPUT_MAX: options->output_max = number(name, optarg, 0, INT64_MAX); break;
        case TIME_MAX: options->time_max = number(name, optarg, 0, INT32_MAX); break;
        case GRACE: options->grace = number(name, optarg, 1, INT32_MAX); break;
        case WAIT: options->waits = true; break;
        case TELL: options->tells = true; break;
        case SPAWNER: options->spawner = true; break;
        case VARIABLE:
            if (!strchr(optarg, '=') || *optarg == '=')
                refuse(name, optarg, "not NAME=VALUE");
            options->variable = optarg;
            break;
        case SPLIT_STDERR: options->split_stderr = true; break;
        case INPUT: options->input = true; break;
        case LIFT_FD:
            if (options->lift_fds_count == LIFTS_MAX)
                refuse(name, optarg, "too many of them");
            options->lift_fds[options->lift_fds_count] = descriptor(name, optarg, 3);
            (void)fcntl(options->lift_fds[options->lift_fds_count++], F_SETFD, FD_CLOEXEC);
            break;
        case LIFT:
            if (options->lifts_count == LIFTS_MAX)
                refuse(name, optarg, "too many of them");
            options->lifts[options->lifts_count++] = optarg;
            break;
        case INPUT_FD: options->input_fd = descriptor(name, optarg, 3); break;
        case ENTER_FD:
            options->enter_fd = descriptor(name, optarg, 3);
            (void)fcntl(options->enter_fd, F_SETFD, FD_CLOEXEC);
            break;
        /* not 3, where the command's errors go */
        case TOOL_FD:
            options->tool_fd = descriptor(name, optarg, 4);
            (void)fcntl(options->tool_fd, F_SETFD, FD_CLOEXEC);
            break;
        case CONNECT: options->connect_port = (uint16_t)number(name, optarg, 1, UINT16_MAX); break;
        case CONTROL: options->control = true; break;
        case TERMINAL: options->terminal = true; break;
        case UPLOAD: options->upload = true; break;
        case WORKSPACE: options->workspace = true; break;
        case KEEP: options->keep = true; break;
        case TOOL: options->tool = true; break;
        case IMAGE_FD:
            if (options->image_count == IMAGE_FDS_MAX)
                refuse(name, optarg, "too many of them");
            options->image_fds[options->image_count] = descriptor(name, optarg, 3);
            (void)fcntl(options->image_fds[options->image_count++], F_SETFD, FD_CLOEXEC);
            options->image = true;
            break;
        case IMAGE_READ_ONLY: options->image_read_only = true; break;
        case MOUNT_AT: add_target(options, name, false); break;
        case OPEN: add_source(options, name, SOURCE_READ_ONLY); break;
        case OPEN_WRITABLE: add_source(options, name, SOURCE_WRITABLE); break;
        case DEVICE_AT: add_target(options, name, true); break;
        case OPEN_DEVICE: add_source(options, name, SOURCE_DEVICE); break;
        case OPEN_FILE: add_source(options, name, SOURCE_FILE); break;
        case LISTEN: add_listener(options, name, optarg); break;
        case LINK: options->link = true; break;
        default:
            /* getopt_long(3) has reported the fault */
            errno = EINVAL;
            fail(STEP_OPTIONS, NULL);
        }
    }
    return command_fd;
}

static void require_user(const struct options *options) {
    if (!options->uid || !options->gid)
        refuse(options->uid ? "gid" : "uid", "(none)", "required, and never 0");
}

void parse_options(int argc, char **argv, struct options *options) {
    *options = (struct options){
        .report_fd = -1,
        .status_fd = -1,
        .cgroup_fd = -1,
        .output_fds = {STDOUT_FILENO, -1},
        .times_fds = {-1, -1},
        .input_fd = -1,
        .enter_fd = -1,
        .tool_fd = -1,
        .upload_fd = -1,
        .patterns_fd = -1,
        .artifacts_fd = -1,
        .archive_fd = -1,
        .control_fd = -1,
        .workspace_fd = -1,
        .link_fd = -1,
        .grace = 10,
        .environment = environ,
    };
    int command_fd = take_options(argc, argv, LINE, options);
    if (options->source_count) {
        if (options->report_fd < 0 || options->waits || options->spawner || command_fd >= 0 || optind < argc)
            refuse("open", "(none)", "only with --report-fd");
        return;
    }
    if (options->spawner) {
        if (options->waits || command_fd >= 0 || optind < argc)
            refuse("spawner", "(none)", "what it spawns is told in requests");
        return;
    }
    if (options->waits) {
        if (options->report_fd < 0 || command_fd >= 0 || optind < argc)
            refuse("wait", "(none)", "the command comes by --report-fd");
        if (options->connect_port && (!is_session(options) || !options->uid || !options->gid))
            refuse("connect", "(none)", "only in a job, and as its user");
        if (options->listener_count && !is_session(options))
            refuse("listen", "(none)", "a job that does not run yet is told in its order");
        if (options->tool_fd >= 0 && !is_session(options))
            refuse("tool-fd", "(none)", "only in a job that runs");
        options->output_fds[0] = options->output_fds[1] = -1;
        return;
    }
    if (is_session(options))
        refuse("enter-fd", "(none)", "a session waits for its order");
    require_user(options);
    if (command_fd >= 0 && optind < argc)
        refuse("command-fd", argv[optind], "the command is given twice");
    if (command_fd >= 0)
        read_command(command_fd, options);
    else if (options->variable)
        refuse("variable", options->variable, "only with a command that comes by a descriptor");
    else if (optind < argc && argv[optind][0])
        options->argv = argv + optind;
    else
        refuse("command-fd", "(none)", "no command is given");
}

void forget_paths(struct options *options) {
    for (int i = 0; i < options->place_count; i++)
        memset(options->places[i].path, 0, strlen(options->places[i].path));
    for (int i = 0; i < options->hide_count; i++)
        memset(options->hides[i], 0, strlen(options->hides[i]));
    for (int i = 0; i < options->mount_count; i++)
        memset(options->mounts[i], 0, strlen(options->mounts[i]));
    if (options->cgroup)
        memset(options->cgroup, 0, strlen(options->cgroup));
    options->cgroup = NULL;
    options->place_count = options->hide_count = options->mount_count = 0;
}

/* Into *argv*, behind its first; it has room for *words_max* more and NULL. Gives their number. */
static int split(const char *option, char *words, size_t length, char **argv, int words_max) {
    int count = 1;
    if (!length || words[length - 1])
        refuse(option, "(words)", "they are cut short");
    for (char *word = words; word < words + length; word += strlen(word) + 1) {
        if (count > words_max)
            refuse(option, "(words)", "too many of them");
        argv[count++] = word;
    }
    argv[count] = NULL;
    return count;
}

void parse_request(char *words, size_t length, struct options *options) {
    enum { WORDS_MAX = 1024 };
    static char *argv[WORDS_MAX + 2] = {"request"};
    parse_options(split("spawner", words, length, argv, WORDS_MAX), argv, options);
    if (!options->waits)
        refuse("spawner", "(words)", "an init of the launcher's waits for its order");
}

void parse_order(char *words, size_t length, const int *fds, size_t fd_count, struct options *options) {
    enum { WORDS_MAX = 27 + 2 * TARGETS_MAX + 2 * LISTENERS_MAX };
    char *argv[WORDS_MAX + 2] = {"order"};
    int count = split("wait", words, length, argv, WORDS_MAX);
    if (take_options(count, argv, ORDER, options) >= 0 || optind < count)
        refuse("wait", "(order)", "the command comes by a descriptor");
    require_user(options);
    if (options->terminal && (options->split_stderr || !options->control))
        refuse("terminal", "(order)", "it has one output, and a control file");
    bool timed = !is_session(options);
    if ((options->upload || options->keep) && is_session(options))
        refuse(options->upload ? "upload" : "keep", "(order)", "only of a job");
    if (options->workspace && is_session(options))
        refuse("workspace", "(order)", "a session has that of its job");
    if (options->tool && (is_session(options) || options->upload || options->keep))
        refuse("tool", "(order)", "only of a job, without files of its own to unpack or to keep");
    if ((options->listener_count || options->link) && is_session(options))
        refuse(options->link ? "link" : "listen", "(order)", "a session has the network of its job");
    if (options->target_count && is_session(options))
        refuse("mount-at", "(order)", "a session has those of its job");
    bool archives = options->upload || options->keep || options->tool;
    if (fd_count != 3U + timed + (1U + timed) * options->split_stderr + options->control + options->input +
                        options->upload + 2U * options->keep + archives + options->workspace +
                        (unsigned)options->target_count + options->link)
        refuse("wait", "(order)", "not the descriptors that it should have");
    int command = *fds++;
    options->output_fds[0] = *fds++;
    options->status_fd = *fds++;
    if (timed)
        options->times_fds[0] = *fds++;
    if (options->split_stderr)
        options->output_fds[1] = *fds++;
    if (options->split_stderr && timed)
        options->times_fds[1] = *fds++;
    if (options->control)
        options->control_fd = *fds++;
    if (options->input)
        options->input_fd = *fds++;
    if (options->keep)
        options->artifacts_fd = *fds++;
    if (options->upload)
        options->upload_fd = *fds++;
    if (options->keep)
        options->patterns_fd = *fds++;
    if (archives)
        options->archive_fd = *fds++;
    /* not 3, where the command's errors go */
    if (options->tool && (options->tool_fd = fcntl(options->archive_fd, F_DUPFD_CLOEXEC, 4)) < 0)
        fail(STEP_ORDER, NULL);
    if (options->workspace)
        options->workspace_fd = *fds++;
    for (int i = 0; i < options->target_count; i++)
        options->targets[i].fd = *fds++;
    if (options->link)
        options->link_fd = *fds;
    read_command(command, options);
}
