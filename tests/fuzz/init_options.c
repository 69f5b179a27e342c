/*
 * The command line and the command file of pjw-init: whatever they are, it refuses, or what comes out is in
 * bounds. An input is the words of the command line and then the bytes of the command, all divided by NULs, after
 * two bytes. The first says how many of them are words (its lower 6 bits), whether they are an order's (bit 6), and
 * whether the command is a pipe (bit 7); the second how many descriptors come with an order (its lower 3 bits, and
 * bits 4 and 5 above these), and whether that is a session's (bit 3).
 *
 * options.c is compiled in here, with its mappings taken from the heap, where ASan guards them, and with an end
 * of the process turned into a jump. Descriptors 100 to 103 are there: a status file, the command, two more.
 */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { STATUS = 100, COMMAND = 101, LAST = 103, WORDS_MAX = 64, MAPPINGS_MAX = 2, PIPE_MAX = 60000 };

static void *heap_map(size_t bytes);
static int heap_unmap(void *memory);

/* those of the fuzzer are not ours to read and close */
static int known_descriptor(int fd) {
    errno = EBADF;
    return fd >= STATUS && fd <= LAST ? fcntl(fd, F_GETFD) : -1;
}

#define mmap(address, bytes, ...) heap_map(bytes)
#define munmap(memory, bytes) heap_unmap(memory)
#define fcntl(fd, ...) known_descriptor(fd)
#include "options.c"
#undef fcntl
#undef munmap
#undef mmap

static jmp_buf ended;
static void *mappings[MAPPINGS_MAX];

static void *heap_map(size_t bytes) {
    for (int i = 0; i < MAPPINGS_MAX; i++)
        if (!mappings[i])
            return mappings[i] = calloc(1, bytes);
    abort();
}

static int heap_unmap(void *memory) {
    for (int i = 0; i < MAPPINGS_MAX; i++)
        if (mappings[i] == memory) {
            mappings[i] = NULL;
            free(memory);
            return 0;
        }
    abort();
}

void fail(enum step step, const char *subject) {
    (void)subject;
    if ((step != STEP_OPTIONS && step != STEP_COMMAND) || !errno)
        abort();
    longjmp(ended, 1);
}

void report_to(int fd) {
    (void)fd;
}

static void must(bool condition) {
    if (!condition)
        abort();
}

static void check(const struct options *options) {
    must(options->uid > 0 && options->uid < UINT32_MAX && options->gid > 0 && options->gid < UINT32_MAX);
    must(options->hide_count >= 0 && options->hide_count <= HIDES_MAX);
    for (int i = 0; i < options->hide_count; i++)
        must(options->hides[i][0] == '/');
    must(options->place_count >= 0 && options->place_count <= PLACES_MAX);
    for (int i = 0; i < options->place_count; i++)
        must(options->places[i].path[0] == '/');
    must(options->mount_count >= 0 && options->mount_count <= MOUNTS_MAX);
    for (int i = 0; i < options->mount_count; i++)
        must(i ? options->mounts[i][0] == '/' : strcmp(options->mounts[i], "/") == 0);
    must(!options->scratch || options->scratch[0] == '/');
    must(options->cgroup_procs_count >= 0 && options->cgroup_procs_count <= CGROUPS_MAX);
    for (int i = 0; i < options->cgroup_procs_count; i++)
        must(options->cgroup_procs_fds[i] >= STATUS);
    must(options->tmp_bytes <= INT64_MAX && options->output_max <= INT64_MAX && options->time_max <= INT32_MAX);
    must(options->argv && options->argv[0] && options->argv[0][0]);
    must(options->input_fd == -1 || options->input_fd >= STATUS);
    must(!options->workdir || options->workdir[0] == '/');
    must(!options->terminal || (options->control_fd >= STATUS && !options->split_stderr));
    size_t words = 0, bytes = 0; /* ASan sees a string that is none */
    for (char **word = options->argv; *word; word++, words++)
        bytes += strlen(*word) + 1;
    if (!options->command_mapped_bytes)
        return;
    must(options->environment == options->argv + words + 1);
    char *end = (char *)options->argv + options->command_mapped_bytes;
    for (char **variable = options->environment; *variable; variable++) {
        if (*variable < (char *)options->environment || *variable >= end) /* one of ours */
            continue;
        must(strchr(*variable, '=') > *variable);
        bytes += strlen(*variable) + 1;
    }
    bytes += (options->workdir ? strlen(options->workdir) : 0) + 2; /* that which ends the variables as well */
    must(!options->workdir || options->workdir == end - bytes);
}

bool is_session(const struct options *options) {
    return options->enter_fd >= 0;
}

/* What an init, or a session, knew before its order stays as it was. */
static void take_order(char *words, size_t length, size_t fd_count, bool session, struct options *options) {
    /* clang-format off */
    char *line[] = {"pjw-init", "--report-fd", "102", "--wait", "--hostname", "job-1", "--scratch", "/scratch",
                    "--enter-fd", "103", NULL};
    /* clang-format on */
    int fds[ORDER_FDS_MAX];
    for (int i = 0; i < ORDER_FDS_MAX; i++)
        fds[i] = i ? STATUS : COMMAND;
    int count = (int)(sizeof line / sizeof *line) - 1 - (session ? 0 : 2);
    line[count] = NULL;
    parse_options(count, line, options);
    parse_order(words, length, fds, fd_count, options);
    must(options->report_fd == 102 && options->hostname == line[5] && options->scratch == line[7]);
    must(options->enter_fd == (session ? LAST : -1) && !options->connect_port);
    must(options->hide_count == 0 && options->place_count == 0 && options->cgroup_fd < 0 &&
         options->cgroup_procs_count == 0);
    must(options->output_fds[0] == STATUS && options->status_fd == STATUS);
    must(options->times_fds[0] == (session ? -1 : STATUS));
    must(options->control_fd == (options->control ? STATUS : -1) && options->input_fd == (options->input ? STATUS : -1));
    must(options->artifacts_fd == (options->keep ? STATUS : -1) && options->patterns_fd == options->artifacts_fd);
    must(options->archive_fd == (options->keep || options->upload ? STATUS : -1) && options->tool_fd < 0);
    must(options->output_fds[1] == (options->split_stderr ? STATUS : -1));
    must(!session || (!options->upload && !options->keep && !options->workspace));
    must(options->upload_fd == (options->upload ? STATUS : -1));
    must(options->workspace_fd == (options->workspace ? STATUS : -1));
    must(options->source_count == 0 && (!session || options->target_count == 0));
    must(options->target_count >= 0 && options->target_count <= TARGETS_MAX);
    for (int i = 0; i < options->target_count; i++)
        must(options->targets[i].path[0] == '/' && strlen(options->targets[i].path) <= TARGET_MAX_BYTES &&
             options->targets[i].fd == STATUS);
    must(options->link_fd == (options->link ? STATUS : -1));
    must(!session || (!options->link && !options->listener_count));
    must(options->listener_count >= 0 && options->listener_count <= LISTENERS_MAX);
}

static void open_descriptors(const char *command, size_t length, bool as_pipe) {
    int file = memfd_create("fuzz", 0), ends[2];
    must(file >= 0 && write(file, command, length) == (ssize_t)length);
    for (int fd = STATUS; fd <= LAST; fd++)
        must(dup2(file, fd) == fd);
    close(file);
    if (!as_pipe || length > PIPE_MAX)
        return;
    must(pipe(ends) == 0 && write(ends[1], command, length) == (ssize_t)length && dup2(ends[0], COMMAND) == COMMAND);
    close(ends[0]);
    close(ends[1]);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char *words[WORDS_MAX + 2] = {"pjw-init"};
    int count = 1;
    if (size < 2)
        return 0;
    const uint8_t what = *data++, order = *data++;
    size -= 1;
    char *text = malloc(size); /* the second byte makes room for a last NUL */
    memcpy(text, data, size - 1);
    text[size - 1] = '\0';
    char *rest = text;
    for (int left = what & 63; left > 0 && rest < text + size - 1; left--) {
        words[count++] = rest;
        rest += strlen(rest) + 1;
    }
    size_t used = (size_t)(rest - text) < size - 1 ? (size_t)(rest - text) : size - 1;
    open_descriptors(text + used, size - 1 - used, what & 128);
    struct options options;
    if (setjmp(ended) == 0) {
        if (what & 64)
            take_order(text, used, (size_t)((order & 7) | (order & 48) >> 1) % (ORDER_FDS_MAX + 1), order & 8, &options);
        else
            parse_options(count, words, &options);
        /* who connects becomes the job's user at once, and has no order */
        must(!options.waits || !options.connect_port || (options.enter_fd >= STATUS && options.uid && options.gid));
        must(!options.source_count || (options.report_fd >= STATUS && !options.waits && !options.spawner));
        if (what & 64 || (!options.waits && !options.spawner && !options.source_count))
            check(&options);
        release_command(&options);
    }
    for (int i = 0; i < MAPPINGS_MAX; i++) { /* the end of the process would have given them back */
        free(mappings[i]);
        mappings[i] = NULL;
    }
    for (int fd = STATUS; fd <= LAST; fd++)
        close(fd);
    free(text);
    return 0;
}
