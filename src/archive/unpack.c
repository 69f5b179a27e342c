/*
 * Unpacks an archive of any maker: POSIX (ustar, pax), GNU's long names, and those without either. Names are made relative and
 * plain before they are used, and the kernel resolves them beneath the directory (openat2(2)), whatever links are in it.
 */
#include "archive.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

static char buffer[BUFFER_BYTES];
static size_t start, filled;

/* the directory that all is made in, and the text that replaces the first component of each name; NULL: none */
static int base = -1;
static const char *wanted, *instead;

/*
 * The file that is not in its place yet, under a name that no other file has: several jobs unpack into a workspace at once,
 * each in the same pid, and a killed one leaves its own file there.
 */
static volatile int half_made_in = -1;
static char half_made[32];

/* of extended headers and long names, for the entry that follows; empty and -1: none */
static char long_name[NAME_MAX_BYTES], long_target[NAME_MAX_BYTES];
static int64_t long_size = -1, long_mtime = -1;

void remove_half_made(void) {
    if (half_made_in >= 0)
        unlinkat(half_made_in, half_made, 0);
    half_made_in = -1;
}

static size_t fill(void) {
    ssize_t got;
    while ((got = read(STDIN_FILENO, buffer, sizeof buffer)) < 0 && errno == EINTR) {}
    if (got < 0)
        cannot("read the archive", "", NULL);
    start = 0;
    filled = (size_t)got;
    return filled;
}

/* The next *count* bytes. Gives false when there is not even one. */
static bool take(void *bytes, size_t count) {
    char *to = bytes;
    for (size_t left = count; left;) {
        if (start == filled && !fill()) {
            if (left == count)
                return false;
            cannot("read the archive", "", "it ends early");
        }
        size_t has = filled - start, some = left < has ? left : has;
        memcpy(to, buffer + start, some);
        start += some;
        to += some;
        left -= some;
    }
    return true;
}

static void require(void *bytes, size_t count) {
    if (count && !take(bytes, count))
        cannot("read the archive", "", "it ends early");
}

static void skip(uint64_t count) {
    while (count) {
        if (start == filled && !fill())
            cannot("read the archive", "", "it ends early");
        uint64_t has = filled - start, some = count < has ? count : has;
        start += (size_t)some;
        count -= some;
    }
}

static uint64_t padding(int64_t size) {
    return -(uint64_t)size % BLOCK_BYTES;
}

/* Octal digits between blanks, or a binary number behind a first byte of 0x80 (GNU); below 0 it is none. */
static int64_t number(const char *field, size_t length) {
    uint64_t value = 0;
    size_t i = 0;
    if (field[0] & 0x80) {
        for (i = 1; i < length; i++) {
            if (value >> 55)
                return -1;
            value = value << 8 | (unsigned char)field[i];
        }
        return (unsigned char)field[0] == 0x80 ? (int64_t)value : -1;
    }
    while (i < length && field[i] == ' ')
        i++;
    for (; i < length && field[i] >= '0' && field[i] <= '7'; i++)
        value = value << 3 | (uint64_t)(field[i] - '0');
    return i < length && field[i] && field[i] != ' ' ? -1 : (int64_t)value;
}

static bool is_right(const struct header *header) {
    const unsigned char *bytes = (const unsigned char *)header;
    unsigned plain = 0;
    int with_signs = 0;
    for (size_t i = 0; i < sizeof *header; i++) {
        bool in_sum = i >= offsetof(struct header, checksum) && i < offsetof(struct header, type);
        plain += in_sum ? ' ' : bytes[i];
        with_signs += in_sum ? ' ' : (signed char)bytes[i];
    }
    int64_t sum = number(header->checksum, sizeof header->checksum);
    return sum == plain || sum == with_signs;
}

static int64_t decimal(const char *text) {
    char *end;
    errno = 0;
    long long value = strtoll(text, &end, 10);
    /* a time has a fraction */
    return errno || end == text || (*end && *end != '.') ? -1 : value;
}

static void keep(char *to, const char *value, size_t length) {
    if (length >= NAME_MAX_BYTES || memchr(value, '\0', length))
        cannot("read the archive", "", "a name in it is longer than 4095 bytes, or has a NUL in it");
    memcpy(to, value, length);
    to[length] = '\0';
}

/* Records of "LENGTH KEY=VALUE\n". */
static void read_extended(char *records, size_t length) {
    static const char WRONG[] = "an extended header in it is no such thing";
    for (char *record = records, *end = records + length; record < end;) {
        char *space = memchr(record, ' ', (size_t)(end - record));
        unsigned long long bytes = space ? strtoull(record, NULL, 10) : 0;
        if (!space || bytes > (size_t)(end - record) || record + bytes <= space + 1 || record[bytes - 1] != '\n')
            cannot("read the archive", "", WRONG);
        char *key = space + 1, *last = record + bytes - 1, *equals = memchr(key, '=', (size_t)(last - key));
        if (!equals)
            cannot("read the archive", "", WRONG);
        *equals = *last = '\0';
        char *value = equals + 1;
        if (strcmp(key, "path") == 0)
            keep(long_name, value, (size_t)(last - value));
        else if (strcmp(key, "linkpath") == 0)
            keep(long_target, value, (size_t)(last - value));
        else if (strcmp(key, "mtime") == 0)
            long_mtime = decimal(value);
        else if (strcmp(key, "size") == 0 && (long_size = decimal(value)) < 0)
            cannot("read the archive", "", WRONG);
        else if (strncmp(key, "GNU.sparse.", 11) == 0)
            cannot("unpack the archive", "", "it has sparse files, which pjw does not know");
        record += bytes;
    }
}

static void read_more(char type, int64_t size) {
    static char *bytes;
    if (size > EXTENDED_MAX_BYTES)
        cannot("read the archive", "", "a header in it is longer than 1 MiB");
    if (!bytes && !(bytes = malloc(EXTENDED_MAX_BYTES + 1)))
        cannot("read the archive", "", NULL);
    require(bytes, (size_t)size);
    skip(padding(size));
    bytes[size] = '\0';
    if (type == 'x')
        read_extended(bytes, (size_t)size);
    else
        keep(type == 'L' ? long_name : long_target, bytes, strnlen(bytes, (size_t)size));
}

/*
 * A name of the archive as a path below `base`, without "." and empty components; "" for `base` itself. A name that leads
 * out is refused, and so is, where a name is wanted, one that is not below it.
 */
static void make_plain(const char *entry, char *path) {
    const char *from = entry;
    size_t used = 0;
    bool first = wanted != NULL;
    if (*from == '/')
        cannot("unpack", entry, "its name is absolute");
    while (*from) {
        size_t length = strcspn(from, "/");
        if (length == 2 && memcmp(from, "..", 2) == 0)
            cannot("unpack", entry, "its name leads out of the directory");
        if (length && !(length == 1 && *from == '.')) {
            const char *component = from;
            size_t component_length = length;
            if (first) {
                if (strlen(wanted) != length || memcmp(from, wanted, length) != 0)
                    cannot("unpack", entry, "it is not below the name that was said");
                component = instead;
                component_length = strlen(instead);
                first = false;
            }
            if (used + component_length + 2 > NAME_MAX_BYTES)
                cannot("unpack", entry, "its name is longer than 4095 bytes");
            if (used)
                path[used++] = '/';
            memcpy(path + used, component, component_length);
            used += component_length;
        }
        from += length;
        while (*from == '/')
            from++;
    }
    path[used] = '\0';
}

static int open_directory(const char *path) {
    return open_beneath(base, path, O_PATH | O_DIRECTORY, RESOLVE_BENEATH);
}

static void make_directory(const char *path, mode_t mode, const char *entry);

/* The directory that a path is in, made where it is missing; it stays open for the next. Gives the last component. */
static const char *enter_parent(char *path, int *parent, const char *entry) {
    static char opened[NAME_MAX_BYTES];
    static int opened_fd = -1;
    char *slash = strrchr(path, '/');
    if (!slash) {
        *parent = base;
        return path;
    }
    *slash = '\0';
    if (opened_fd < 0 || strcmp(opened, path) != 0) {
        int fd = open_directory(path);
        for (char *next = path; fd < 0 && errno == ENOENT && next;) {
            /* from the first component on, which is seldom needed: archives name a directory before its entries */
            next = strchr(next + (next != path), '/');
            if (next)
                *next = '\0';
            make_directory(path, 0777, entry);
            if (next)
                *next = '/';
            else
                fd = open_directory(path);
            errno = fd < 0 ? ENOENT : 0;
        }
        if (fd < 0)
            cannot("enter the directory of", entry,
                   errno == EXDEV ? "a link in its name leads out of the directory" : NULL);
        if (opened_fd >= 0)
            close(opened_fd);
        opened_fd = fd;
        strcpy(opened, path);
    }
    *slash = '/';
    *parent = opened_fd;
    return slash + 1;
}

/* Its parent is there. */
static void make_directory(const char *path, mode_t mode, const char *entry) {
    static char of_parent[NAME_MAX_BYTES];
    int parent = base, there;
    const char *slash = strrchr(path, '/'), *leaf = slash ? slash + 1 : path;
    if (slash) {
        memcpy(of_parent, path, (size_t)(slash - path));
        of_parent[slash - path] = '\0';
        parent = open_directory(of_parent);
        if (parent < 0)
            cannot("enter the directory of", entry,
                   errno == EXDEV ? "a link in its name leads out of the directory" : NULL);
    }
    /* we have to be able to make its entries */
    if (mkdirat(parent, leaf, (mode & 0777) | 0700) < 0) {
        int error = errno;
        if (error != EEXIST || (there = open_directory(path)) < 0) {
            errno = error;
            cannot("make the directory", entry, error == EEXIST ? "there is something else by its name" : NULL);
        }
        close(there);
    }
    if (slash)
        close(parent);
}

static void write_contents(int fd, int64_t size, const char *entry) {
    for (uint64_t left = (uint64_t)size; left;) {
        if (start == filled && !fill())
            cannot("read the archive", "", "it ends early");
        size_t has = filled - start, some = left < has ? (size_t)left : has;
        ssize_t written = write(fd, buffer + start, some);
        if (written < 0 && errno == EINTR)
            continue;
        if (written < 0)
            cannot("write", entry, NULL);
        start += (size_t)written;
        left -= (uint64_t)written;
    }
    skip(padding(size));
}

static void put_in_place(int parent, const char *leaf, const char *entry) {
    if (renameat(parent, half_made, parent, leaf) < 0)
        cannot("make", entry, NULL);
    half_made_in = -1;
}

/* Under another name until it is whole, then in the place of the file that had its name. */
static void make_file(int parent, const char *leaf, const struct header *header, int64_t size, int64_t mtime,
                      const char *entry) {
    int64_t mode = number(header->mode, sizeof header->mode);
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = mtime < 0 ? 0 : mtime}};
    half_made_in = parent;
    int fd = openat(parent, half_made, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0) {
        half_made_in = -1;
        cannot("make", entry, NULL);
    }
    write_contents(fd, size, entry);
    if (fchmod(fd, (mode < 0 ? 0644 : (mode_t)mode) & 0777) < 0 || futimens(fd, times) < 0)
        cannot("set the mode and time of", entry, NULL);
    if (close(fd) < 0)
        cannot("write", entry, NULL);
    put_in_place(parent, leaf, entry);
}

static void make_link(int parent, const char *leaf, const char *target, const char *entry) {
    half_made_in = parent;
    if (symlinkat(target, parent, half_made) < 0) {
        half_made_in = -1;
        cannot("make the link", entry, NULL);
    }
    put_in_place(parent, leaf, entry);
}

/* A hard link to an earlier entry. */
static void make_hard_link(int parent, const char *leaf, const char *target, const char *entry) {
    static char path[NAME_MAX_BYTES];
    make_plain(target, path);
    char *slash = strrchr(path, '/');
    int from = base;
    if (slash) {
        *slash = '\0';
        from = open_directory(path);
    }
    const char *source = slash ? slash + 1 : path;
    struct stat status;
    bool there = from >= 0;
    half_made_in = parent;
    while (there && linkat(from, source, parent, half_made, 0) < 0) {
        if (errno != ENOENT) {
            half_made_in = -1;
            cannot("link", entry, NULL);
        }
        /* another one replaces it just now, or it is missing */
        there = fstatat(from, source, &status, AT_SYMLINK_NOFOLLOW) == 0;
    }
    if (!there) {
        half_made_in = -1;
        cannot("link", entry, "what it is to be a link to is not there");
    }
    put_in_place(parent, leaf, entry);
    /* where a link to the same file had its name, it is there still (rename(2)) */
    unlinkat(parent, half_made, 0);
    if (slash)
        close(from);
}

static void make_entry(const struct header *header, char type, int64_t size) {
    static char entry[NAME_MAX_BYTES], target[NAME_MAX_BYTES], path[NAME_MAX_BYTES];
    int parent;
    bool has_prefix = memcmp(header->magic, "ustar", 6) == 0 && header->prefix[0];
    int64_t mtime = long_mtime >= 0 ? long_mtime : number(header->mtime, sizeof header->mtime);
    if (*long_name)
        strcpy(entry, long_name);
    else
        snprintf(entry, sizeof entry, "%.*s%s%.*s", has_prefix ? (int)sizeof header->prefix : 0, header->prefix,
                 has_prefix ? "/" : "", (int)sizeof header->name, header->name);
    if (*long_target)
        strcpy(target, long_target);
    else
        snprintf(target, sizeof target, "%.*s", (int)sizeof header->linkname, header->linkname);
    *long_name = *long_target = '\0';
    long_size = long_mtime = -1;

    if ((type == '0' || type == '\0') && *entry && entry[strlen(entry) - 1] == '/')
        type = '5';
    make_plain(entry, path);
    if (!*path) {
        if (type != '5')
            cannot("unpack", *entry ? entry : "an entry", "it has no name");
        return;
    }
    const char *leaf = enter_parent(path, &parent, entry);
    switch (type) {
    case '0':
    case '\0':
    case '7': make_file(parent, leaf, header, size, mtime, entry); break;
    case '1': make_hard_link(parent, leaf, target, entry); break;
    case '2': make_link(parent, leaf, target, entry); break;
    case '5': {
        int64_t mode = number(header->mode, sizeof header->mode);
        make_directory(path, mode < 0 ? 0755 : (mode_t)mode, entry);
        break;
    }
    case '3':
    case '4': left_out(entry, "a device"); break;
    case '6': left_out(entry, "a FIFO"); break;
    default: cannot("unpack", entry, "it is of a kind that pjw does not know");
    }
}

static void enter(const char *name, const char *path) {
    static char stripped[NAME_MAX_BYTES];
    size_t length = strlen(path);
    if (!length || length >= sizeof stripped)
        cannot("unpack into", path, "a path has from 1 to 4095 bytes");
    memcpy(stripped, path, length + 1);
    while (length > 1 && stripped[length - 1] == '/')
        stripped[--length] = '\0';
    base = open(stripped, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (!*name) {
        if (base < 0 && errno == ENOENT && mkdir(stripped, 0755) == 0)
            base = open(stripped, O_PATH | O_DIRECTORY | O_CLOEXEC);
        if (base < 0)
            cannot("unpack into", path, NULL);
        return;
    }
    wanted = instead = name;
    if (base >= 0)
        return;
    /* it is the name of the new file, or of a file that is replaced */
    if ((errno != ENOENT && errno != ENOTDIR) || path[strlen(path) - 1] == '/')
        cannot("unpack into", path, NULL);
    char *slash = strrchr(stripped, '/');
    instead = slash ? slash + 1 : stripped;
    if (slash)
        *slash = '\0';
    base = open(!slash ? "." : *stripped ? stripped : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (base < 0)
        cannot("unpack into", path, NULL);
}

void unpack(const char *name, const char *path) {
    static const struct header ZEROS;
    struct header header;
    uint64_t random;
    if (getrandom(&random, sizeof random, 0) != sizeof random)
        cannot("draw a name for", "what is not whole", NULL);
    snprintf(half_made, sizeof half_made, ".pjw-archive.%016" PRIx64, random);
    enter(name, path);
    for (;;) {
        if (!take(&header, sizeof header))
            cannot("read the archive", "", "it ends early");
        if (memcmp(&header, &ZEROS, sizeof header) == 0)
            break;
        if (!is_right(&header))
            cannot("read the archive", "", "it is no tar archive, or is damaged");
        int64_t size = long_size >= 0 && !strchr("xgLK", header.type) ? long_size : number(header.size, sizeof header.size);
        if (size < 0)
            cannot("read the archive", "", "a size in it is none");
        if (header.type && strchr("xLK", header.type))
            read_more(header.type, size);
        else if (header.type == 'g' || header.type == 'V')
            skip((uint64_t)size + padding(size));
        else
            make_entry(&header, header.type, size);
    }
    /* to its end, or the sender would fail */
    while (fill()) {}
}
