/*
 * Names for a job's user and host, for programs that ask libc. The job gets its own passwd(5) and group(5), with the
 * host's lines and one more, and a hosts(5) with the job itself and the names
 * that it may reach by listeners of its own (network.c), since its network has nothing else. They are
 * files, not a service of nsswitch.conf(5): every libc reads files, static programs do too, and nearly every host has
 * "files" in nsswitch.conf. The job's line comes last, so the host's own names keep their meaning.
 */
#include "init.h"
#include "mounts.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

/* The files use the job's memory, so of a larger file the job gets only its own line. */
enum { HOST_BYTES_MAX = 256 << 10 };

enum { USERS, GROUPS, USER_FILES };
static const char *const USER_PATHS[USER_FILES] = {"/etc/passwd", "/etc/group"};
/* open until the user is known */
static int user_fds[USER_FILES] = {-1, -1}, hosts_fd = -1;

/* Whether the host has nothing at such a path, a link to nothing, or a file that cannot be opened, such as a socket. */
static bool is_missing(int error) {
    return error == ENOENT || error == ENOTDIR || error == ELOOP || error == ENXIO;
}

static int create(const char *path) {
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    if (fd < 0)
        fail(STEP_NAMES, path);
    return fd;
}

static void write_all(int fd, const char *text, size_t length, const char *path) {
    while (length) {
        ssize_t put = write(fd, text, length);
        if (put < 0)
            fail(STEP_NAMES, path);
        text += put;
        length -= (size_t)put;
    }
}

/* Copy the host's lines that any user may read: nothing of a file that others cannot read, or that is no regular file. */
static void copy_lines(const char *path, int to) {
    char buffer[4096], last = '\n';
    struct stat status;
    ssize_t got;
    int from = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (from < 0 && is_missing(errno))
        return;
    if (from < 0 || fstat(from, &status) < 0)
        fail(STEP_NAMES, path);
    if (S_ISREG(status.st_mode) && status.st_mode & S_IROTH && status.st_size <= HOST_BYTES_MAX) {
        for (off_t left = HOST_BYTES_MAX; left > 0 && (got = read(from, buffer, sizeof buffer)) != 0; left -= got) {
            if (got < 0)
                fail(STEP_NAMES, path);
            write_all(to, buffer, (size_t)got, path);
            last = buffer[got - 1];
        }
        if (last != '\n')
            write_all(to, "\n", 1, path);
    }
    close(from);
}

/* Bind it over the host's file, if there is one: a read-only view takes no new file. */
static void show_file(const struct options *options, const char *own, const char *path) {
    if (options->image && !is_plain(path, false))
        return; /* a link could have us cover something else */
    if (mount(own, path, NULL, MS_BIND, NULL) == 0) {
        if (set_attributes(AT_FDCWD, path, 0,
                           (struct attributes){.set = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC}) < 0)
            fail(STEP_NAMES, path);
    } else if (!is_missing(errno))
        fail(STEP_NAMES, path);
}

/* The first name of an address is the canonical one, and programs such as git(1) want a dot in it. */
static void make_hosts(const struct options *options) {
    const char *hostname = options->hostname;
    char text[256];
    hosts_fd = create(BASE "/hosts");
    int length = snprintf(text, sizeof text,
                          "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n"
                          "127.0.1.1\t%.64s.localdomain %.64s\n",
                          hostname, hostname);
    write_all(hosts_fd, text, (size_t)length, "/etc/hosts");
    show_file(options, BASE "/hosts", "/etc/hosts");
}

void make_names(const struct options *options) {
    static const char *const own[USER_FILES] = {BASE "/passwd", BASE "/group"};
    for (int i = 0; i < USER_FILES; i++) {
        user_fds[i] = create(own[i]);
        copy_lines(USER_PATHS[i], user_fds[i]);
        show_file(options, own[i], USER_PATHS[i]);
    }
    if (options->hostname)
        make_hosts(options);
}

/* Several listeners of one host have one address, and follow each other. */
static void finish_hosts(const struct options *options) {
    char line[HOST_MAX_BYTES + 32], address[INET_ADDRSTRLEN];
    uint32_t last = 0;
    for (int i = 0; i < options->listener_count; i++) {
        const struct listener *listener = &options->listeners[i];
        if (!*listener->host || listener->address == last || hosts_fd < 0)
            continue;
        last = listener->address;
        inet_ntop(AF_INET, &listener->address, address, sizeof address);
        int length = snprintf(line, sizeof line, "%s\t%s\n", address, listener->host);
        write_all(hosts_fd, line, (size_t)length, "/etc/hosts");
    }
    if (hosts_fd >= 0)
        close(hosts_fd);
}

void finish_names(const struct options *options) {
    uid_t uid = options->uid;
    gid_t gid = options->gid;
    char lines[USER_FILES][96];
    /* it has a real name, since some programs want one; "x" means that its password is in shadow(5), which has none */
    snprintf(lines[USERS], sizeof lines[USERS], "pjw-job:x:%u:%u:Job of pjw:/run/job:/bin/sh\n", uid, gid);
    snprintf(lines[GROUPS], sizeof lines[GROUPS], "pjw-job:x:%u:\n", gid);
    for (int i = 0; i < USER_FILES; i++) {
        write_all(user_fds[i], lines[i], strlen(lines[i]), USER_PATHS[i]);
        close(user_fds[i]);
    }
    finish_hosts(options);
}
