/*
 * Packs a file or a directory. A file that changes meanwhile is packed as it was when it was opened, or it is an error:
 * never short.
 */
#include "archive.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <unistd.h>

enum { OCTAL_SIZE_DIGITS = 11, SENT_FROM_BYTES = 64 << 10, PATTERNS_MAX_BYTES = 64 << 10 };
/* the largest number of 11 octal digits */
static const int64_t SIZE_MAX_BYTES = INT64_C(077777777777);

static char buffer[BUFFER_BYTES];
static size_t filled;
/* the name in the archive of the file being packed, and of a directory with a slash at its end */
static char name[NAME_MAX_BYTES];

/* Whether an error is that of the output file, which sendfile(2) does not tell apart. */
static bool is_of_archive(int error) {
    return error == ENOSPC || error == EDQUOT || error == EFBIG || error == EPIPE;
}

static _Noreturn void cannot_write(void) {
    cannot("write the archive", "", errno == EFBIG ? "it is larger than the job's output may be" : NULL);
}

static void write_all(const char *bytes, size_t count) {
    while (count) {
        ssize_t written = write(STDOUT_FILENO, bytes, count);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            cannot_write();
        bytes += written;
        count -= (size_t)written;
    }
}

static void flush(void) {
    write_all(buffer, filled);
    filled = 0;
}

static void put(const void *bytes, size_t count) {
    const char *from = bytes;
    while (count) {
        size_t room = sizeof buffer - filled, some = count < room ? count : room;
        memcpy(buffer + filled, from, some);
        filled += some;
        from += some;
        count -= some;
        if (filled == sizeof buffer)
            flush();
    }
}

static void pad(uint64_t written) {
    static const char zeros[BLOCK_BYTES];
    put(zeros, (size_t)(-written % BLOCK_BYTES));
}

static void put_header(struct header *header, const char *entry, char type, const struct stat *status, int64_t size) {
    unsigned sum = 0;
    memcpy(header->name, entry, strnlen(entry, sizeof header->name));
    header->type = type;
    snprintf(header->mode, sizeof header->mode, "%07o", status->st_mode & 0777);
    memcpy(header->uid, "0000000", 8);
    memcpy(header->gid, "0000000", 8);
    snprintf(header->size, sizeof header->size, "%011llo", (unsigned long long)(size > SIZE_MAX_BYTES ? 0 : size));
    int64_t mtime = status->st_mtime < 0 ? 0 : status->st_mtime > SIZE_MAX_BYTES ? SIZE_MAX_BYTES : status->st_mtime;
    snprintf(header->mtime, sizeof header->mtime, "%011llo", (unsigned long long)mtime);
    memcpy(header->magic, "ustar", 6);
    memcpy(header->version, "00", 2);
    memset(header->checksum, ' ', sizeof header->checksum);
    for (size_t i = 0; i < sizeof *header; i++)
        sum += ((unsigned char *)header)[i];
    snprintf(header->checksum, sizeof header->checksum, "%06o", sum);
    put(header, sizeof *header);
}

/* One record of an extended header: its length, itself included, is in front of it. */
static size_t add_record(char *records, size_t used, size_t most, const char *key, const char *value) {
    size_t rest = strlen(key) + strlen(value) + 3, length = rest;
    char digits[24];
    do {
        snprintf(digits, sizeof digits, "%zu", length);
    } while (strlen(digits) + rest != length && (length = strlen(digits) + rest));
    return used + (size_t)snprintf(records + used, most - used, "%zu %s=%s\n", length, key, value);
}

/* Values for which a header has no room are in an extended one before it. */
static void put_entry(char type, const struct stat *status, int64_t size, const char *target) {
    static char records[3 * NAME_MAX_BYTES];
    struct header header = {0};
    size_t used = 0;
    if (strlen(name) > sizeof header.name)
        used = add_record(records, used, sizeof records, "path", name);
    if (target && strlen(target) > sizeof header.linkname)
        used = add_record(records, used, sizeof records, "linkpath", target);
    if (size > SIZE_MAX_BYTES) {
        char digits[24];
        snprintf(digits, sizeof digits, "%lld", (long long)size);
        used = add_record(records, used, sizeof records, "size", digits);
    }
    if (used) {
        struct header extended = {0};
        struct stat plain = {.st_mode = 0644};
        put_header(&extended, "pax", 'x', &plain, (int64_t)used);
        put(records, used);
        pad(used);
    }
    if (target)
        memcpy(header.linkname, target, strnlen(target, sizeof header.linkname));
    put_header(&header, name, type, status, size);
}

static void put_contents(int fd, int64_t size) {
    int64_t left = size;
    bool sends = size >= SENT_FROM_BYTES;
    if (sends)
        flush();
    while (left) {
        size_t most = left < BUFFER_BYTES ? (size_t)left : BUFFER_BYTES;
        ssize_t got;
        if (sends) {
            got = sendfile(STDOUT_FILENO, fd, NULL, most);
            if (got < 0 && errno == EINVAL) { /* a file system without it, or an odd stdout */
                sends = false;
                continue;
            }
        } else {
            if (filled == sizeof buffer)
                flush();
            size_t room = sizeof buffer - filled;
            got = read(fd, buffer + filled, most < room ? most : room);
            if (got > 0)
                filled += (size_t)got;
        }
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && sends && is_of_archive(errno))
            cannot_write();
        if (got < 0)
            cannot("read", name, NULL);
        if (got == 0)
            cannot("read", name, "it has become shorter meanwhile");
        left -= got;
    }
    pad((uint64_t)size);
}

/* A file that cannot fit by itself is not begun: with a hole it may be larger than any disk. */
static void require_room(int64_t size) {
    struct rlimit most;
    if (getrlimit(RLIMIT_FSIZE, &most) == 0 && most.rlim_cur != RLIM_INFINITY && (uint64_t)size > most.rlim_cur) {
        errno = EFBIG;
        cannot_write();
    }
}

static void put_file(int fd) {
    struct stat status;
    if (fstat(fd, &status) < 0)
        cannot("look at", name, NULL);
    if (S_ISREG(status.st_mode))
        require_room(status.st_size);
    if (!S_ISREG(status.st_mode)) {
        left_out(name, "it is another thing now");
    } else {
        put_entry('0', &status, status.st_size, NULL);
        put_contents(fd, status.st_size);
    }
    close(fd);
}

static void put_link(int directory, const char *leaf, const struct stat *status) {
    static char target[NAME_MAX_BYTES];
    ssize_t length = readlinkat(directory, leaf, target, sizeof target - 1);
    if (length < 0)
        cannot("read the link", name, NULL);
    target[length] = '\0';
    put_entry('2', status, 0, target);
}

/* Gives how long the name was. */
static size_t add_to_name(const char *leaf, const char *after) {
    size_t length = strlen(name);
    if (length + strlen(leaf) + strlen(after) >= sizeof name)
        cannot("pack what is in", name, "a name would be longer than 4095 bytes");
    stpcpy(stpcpy(name + length, leaf), after);
    return length;
}

/* Whether an error is that of something that was removed since its directory was read. */
static bool has_gone(void) {
    if (errno != ENOENT)
        return false;
    left_out(name, "it has been removed meanwhile");
    return true;
}

/* Anything but a directory. */
static void put_other(int directory, const char *leaf, const struct stat *status) {
    if (S_ISLNK(status->st_mode)) {
        put_link(directory, leaf, status);
        return;
    }
    if (!S_ISREG(status->st_mode)) {
        left_out(name, S_ISFIFO(status->st_mode) ? "a FIFO" : S_ISSOCK(status->st_mode) ? "a socket" : "a device");
        return;
    }
    int fd = openat(directory, leaf, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
    if (fd >= 0)
        put_file(fd);
    else if (!has_gone())
        cannot("read", name, NULL);
}

struct names {
    char *bytes;
    size_t used, room;
};

static void remember(struct names *names, const char *leaf) {
    size_t length = strlen(leaf) + 1;
    if (names->used + length > names->room) {
        names->room = 2 * names->room + length + 256;
        char *bytes = realloc(names->bytes, names->room);
        if (!bytes)
            cannot("pack", name, NULL);
        names->bytes = bytes;
    }
    memcpy(names->bytes + names->used, leaf, length);
    names->used += length;
}

/* Patterns: one after the other, each ended by NUL. */
static char patterns[PATTERNS_MAX_BYTES];
static size_t patterns_bytes;
static bool found;

/* How a name stands to a pattern; the higher one counts where there are several. */
enum match {
    MATCH_NONE,
    MATCH_BELOW, /* entries of a directory of this name may match */
    MATCH_TREE,  /* all that is in a directory of this name does */
    MATCH_WHOLE,
};

static bool component_matches(const char *pattern, size_t pattern_length, const char *path, size_t path_length) {
    char one[NAME_MAX + 1], other[NAME_MAX + 1];
    if (pattern_length > NAME_MAX || path_length > NAME_MAX)
        return false;
    memcpy(one, pattern, pattern_length);
    memcpy(other, path, path_length);
    one[pattern_length] = other[path_length] = '\0';
    return fnmatch(one, other, 0) == 0;
}

/* Both without a slash at their ends; one that is used up is empty. */
static enum match match(const char *pattern, const char *path) {
    size_t length = strcspn(pattern, "/"), path_length = strcspn(path, "/");
    const char *rest = pattern + length + (pattern[length] == '/');
    const char *path_rest = path + path_length + (path[path_length] == '/');
    bool any = length == 2 && strncmp(pattern, "**", 2) == 0;
    if (!*pattern)
        return *path ? MATCH_NONE : MATCH_WHOLE;
    if (!*path)
        return any && match(rest, path) >= MATCH_TREE ? MATCH_TREE : MATCH_BELOW;
    if (any && !*rest)
        return MATCH_WHOLE;
    if (any) {
        enum match none = match(rest, path), one = none == MATCH_WHOLE ? none : match(pattern, path_rest);
        return none > one ? none : one;
    }
    return component_matches(pattern, length, path, path_length) ? match(rest, path_rest) : MATCH_NONE;
}

/* Match the name of the file being packed, below the root. */
static enum match match_name(void) {
    enum match best = MATCH_NONE;
    for (size_t at = 0; at < patterns_bytes && best != MATCH_WHOLE; at += strlen(patterns + at) + 1) {
        enum match each = match(patterns + at, strchr(name, '/') + 1);
        best = each > best ? each : best;
    }
    return best;
}

/* A directory that is being packed, in those that it is in. */
struct level {
    struct level *above;
    size_t name_length; /* of its own name in the archive */
    bool put, whole;    /* whether it is in the archive already, and whether all that is in it comes */
    struct stat status;
};

/* Before the first thing in it: directories of which nothing is taken are not in the archive. */
static void put_level(struct level *level) {
    if (!level || level->put)
        return;
    put_level(level->above);
    char kept = name[level->name_length];
    name[level->name_length] = '\0';
    put_entry('5', &level->status, 0, NULL);
    name[level->name_length] = kept;
    level->put = true;
}

/*
 * The directory `path` below *root*, whose name in the archive is complete. Its directories come after everything else in it,
 * when it is closed again: so a deep tree takes neither descriptors nor the names of all its files.
 */
static void put_directory(int root, const char *path, struct level *above, bool whole) {
    struct stat status;
    struct level own = {.above = above, .name_length = strlen(name), .whole = whole};
    struct names directories = {0};
    int fd = open_beneath(root, path, O_RDONLY | O_DIRECTORY, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS);
    if (fd < 0 && *path && strcmp(path, ".") != 0 && has_gone())
        return;
    DIR *directory = fd < 0 ? NULL : fdopendir(fd);
    if (!directory || fstat(fd, &own.status) < 0)
        cannot("read", name, NULL);
    if (whole)
        put_level(&own);
    struct dirent *entry;
    for (errno = 0; (entry = readdir(directory)) != NULL; errno = 0) {
        const char *leaf = entry->d_name;
        if (strcmp(leaf, ".") == 0 || strcmp(leaf, "..") == 0)
            continue;
        size_t length = add_to_name(leaf, "");
        enum match matched = whole ? MATCH_WHOLE : match_name();
        if (matched == MATCH_NONE) {
            name[length] = '\0';
            continue;
        }
        if (fstatat(fd, leaf, &status, AT_SYMLINK_NOFOLLOW) < 0) {
            if (!has_gone())
                cannot("look at", name, NULL);
        } else if (S_ISDIR(status.st_mode)) {
            remember(&directories, leaf);
        } else if (matched == MATCH_WHOLE) {
            put_level(&own);
            found = true;
            put_other(fd, leaf, &status);
        }
        name[length] = '\0';
    }
    if (errno)
        cannot("read", name, NULL);
    closedir(directory);
    for (size_t at = 0; at < directories.used; at += strlen(directories.bytes + at) + 1) {
        const char *leaf = directories.bytes + at;
        static char next[NAME_MAX_BYTES];
        size_t length = add_to_name(leaf, ""), path_length;
        bool all = whole || match_name() >= MATCH_TREE;
        (void)add_to_name("/", "");
        found |= all;
        /* the path is the name behind the first component, which stands for the root */
        const char *below = strchr(name, '/') + 1;
        path_length = strlen(below) - 1;
        memcpy(next, below, path_length);
        next[path_length] = '\0';
        put_directory(root, next, &own, all);
        name[length] = '\0';
    }
    free(directories.bytes);
}

/* The last component of a path; "." where that is none to call anything by. */
static const char *base_of(const char *path) {
    static char base[NAME_MAX_BYTES];
    size_t end = strlen(path), start;
    while (end && path[end - 1] == '/')
        end--;
    for (start = end; start && path[start - 1] != '/'; start--) {}
    if (end - start >= sizeof base)
        cannot("pack", path, "the name is longer than 4095 bytes");
    memcpy(base, path + start, end - start);
    base[end - start] = '\0';
    return !*base || strcmp(base, "..") == 0 ? "." : base;
}

static void put_end(void) {
    static const char end[2 * BLOCK_BYTES];
    put(end, sizeof end);
    flush();
}

bool collect(void) {
    ssize_t got;
    while ((got = read(STDIN_FILENO, patterns + patterns_bytes, sizeof patterns - patterns_bytes)) > 0)
        patterns_bytes += (size_t)got;
    if (got < 0 || !patterns_bytes || patterns[patterns_bytes - 1])
        cannot("read the patterns", "", got < 0 ? NULL : "they are cut short");
    int root = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        cannot("read", ".", NULL);
    (void)add_to_name(".", "/");
    put_directory(root, ".", NULL, false);
    if (found)
        put_end();
    return found;
}

void pack(const char *path) {
    struct stat status;
    if (stat(path, &status) < 0)
        cannot("read", path, NULL);
    add_to_name(base_of(path), S_ISDIR(status.st_mode) ? "/" : "");
    if (S_ISDIR(status.st_mode)) {
        int root = open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (root < 0)
            cannot("read", path, NULL);
        put_directory(root, ".", NULL, true);
    } else if (S_ISREG(status.st_mode)) {
        int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        if (fd < 0)
            cannot("read", path, NULL);
        put_file(fd);
    } else {
        cannot("read", path, "neither a file nor a directory");
    }
    put_end();
}
