/*
 * Directories that the operator offers to jobs, and devices with their files. Two processes do that: one, which is no init,
 * opens them in the host's tree and hands the launcher a mount of each; the job's init attaches these in the job's tree. So
 * neither the launcher nor an init ever walks to a file server that is gone, and an init never has a path of the host's.
 */
#include "init.h"
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/openat2.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_openat2
#define SYS_openat2 437
#endif
enum { MOVE_TO_EMPTY_PATH = 0x40 }; /* move_mount(2) */
static const char MNT[] = "/mnt";

/* Follows no link, not even on the way: in the host's tree the owner of a directory there could lead us elsewhere. */
static int open_directory(int at, const char *path) {
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
    return (int)syscall(SYS_openat2, at, path, &how, sizeof how);
}

static int open_any(int at, const char *path) {
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
    return (int)syscall(SYS_openat2, at, path, &how, sizeof how);
}

/* A mount of one device is that device's node alone: its other name in the job makes no second device. */
static int require_device(int fd) {
    struct stat status;
    if (fstat(fd, &status) < 0)
        return -1;
    errno = ENODEV;
    return S_ISCHR(status.st_mode) ? 0 : -1;
}

static int open_source(const struct source *source) {
    static const uint64_t flags[] = {
        [SOURCE_READ_ONLY] = ATTR_NOSUID | ATTR_NODEV | ATTR_RDONLY,
        [SOURCE_WRITABLE] = ATTR_NOSUID | ATTR_NODEV,
        [SOURCE_DEVICE] = ATTR_NOSUID | ATTR_NOEXEC,
        [SOURCE_FILE] = ATTR_NOSUID | ATTR_NODEV | ATTR_RDONLY,
    };
    struct attributes attributes = {.set = flags[source->kind], .propagation = MS_PRIVATE};
    struct statvfs status;
    bool of_device = source->kind == SOURCE_DEVICE || source->kind == SOURCE_FILE;
    int found = of_device ? open_any(AT_FDCWD, source->path) : open_directory(AT_FDCWD, source->path);
    if (found < 0 || (source->kind == SOURCE_DEVICE && require_device(found) < 0))
        return -1;
    int tree = (int)syscall(SYS_open_tree, found, "", AT_EMPTY_PATH | TREE_CLONE | O_CLOEXEC);
    if (tree < 0 || set_attributes(tree, "", AT_EMPTY_PATH, attributes) < 0 || fstatvfs(tree, &status) < 0)
        return -1;
    /* the host's own flags stay, such as those of a unit of systemd's */
    if (source->kind == SOURCE_WRITABLE && status.f_flag & ST_RDONLY) {
        errno = EROFS;
        return -1;
    }
    if (source->kind == SOURCE_DEVICE && status.f_flag & ST_NODEV) {
        errno = EACCES;
        return -1;
    }
    close(found);
    return tree;
}

void hand_over_sources(const struct options *options) {
    for (int i = 0; i < options->source_count; i++) {
        int tree = open_source(&options->sources[i]);
        if (tree < 0)
            fail(STEP_MOUNT_SOURCE, NULL); /* no client may learn the path */
        report_opened(tree);
        close(tree);
    }
    _exit(0);
}

/* A new directory belongs to the owner of the one that it is made in. */
static int make_and_open(int at, const char *name) {
    struct stat parent;
    if (mkdirat(at, name, 0755) < 0 && errno != EEXIST)
        return -1;
    int made = open_directory(at, name);
    if (made >= 0 && fstat(at, &parent) == 0 && parent.st_uid)
        (void)fchownat(made, "", parent.st_uid, parent.st_gid, AT_EMPTY_PATH);
    return made;
}

/* A file that only a mount is to cover. */
static int make_and_open_file(int at, const char *name) {
    if (mknodat(at, name, S_IFREG, 0) < 0 && errno != EEXIST)
        return -1;
    return open_any(at, name);
}

/* In the job's tree, step by step: a missing directory is made, where that can be. Gives -1 and errno. */
static int open_target(const char *path, bool directory) {
    char name[NAME_MAX + 1];
    int at = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    while (at >= 0 && *path) {
        size_t length = strcspn(++path, "/");
        snprintf(name, sizeof name, "%.*s", (int)length, path);
        path += length;
        bool is_file = !*path && !directory;
        int next = is_file ? open_any(at, name) : open_directory(at, name);
        if (next < 0 && errno == ENOENT)
            next = is_file ? make_and_open_file(at, name) : make_and_open(at, name);
        int error = errno;
        close(at);
        errno = error;
        at = next;
    }
    return at;
}

static bool lies_in_mnt(const char *path) {
    return strncmp(path, MNT, sizeof MNT - 1) == 0 && path[sizeof MNT - 1] == '/';
}

/* The host's tree is read-only, so /mnt, where mounts are by default, gives way to one with places for all of them there. */
static bool cover_mnt(const struct options *options) {
    for (int i = 0; i < options->target_count; i++) {
        const char *path = options->targets[i].path;
        if (options->targets[i].of_device || !lies_in_mnt(path))
            continue;
        int target = open_target(path, true);
        if (target < 0 && errno == EROFS) {
            unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOEXEC;
            if (mount("tmpfs", MNT, "tmpfs", flags, "mode=0755,size=64k,nr_inodes=256") < 0)
                fail(STEP_MOUNT_AT, path);
            return true;
        }
        if (target >= 0)
            close(target);
    }
    return false;
}

/*
 * Only the files of a device may have their places in the job's own file systems, which are read-only at all other times.
 */
static void let_make_places(bool may) {
    static const char *const own[] = {"/dev", "/run"};
    struct attributes attributes = {.set = may ? 0 : ATTR_RDONLY, .clear = may ? ATTR_RDONLY : 0};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (set_attributes(AT_FDCWD, own[i], 0, attributes) < 0)
            fail(STEP_DEVICE_AT, own[i]);
}

static void attach(const struct target *offered) {
    struct stat status;
    int target = fstat(offered->fd, &status) < 0 ? -1 : open_target(offered->path, S_ISDIR(status.st_mode));
    if (target < 0 || syscall(SYS_move_mount, offered->fd, "", target, "", MOVE_FROM_EMPTY_PATH | MOVE_TO_EMPTY_PATH) < 0)
        fail(offered->of_device ? STEP_DEVICE_AT : STEP_MOUNT_AT, offered->path);
    close(target);
    close(offered->fd);
}

void mount_offered(const struct options *options) {
    bool covered = cover_mnt(options);
    int i = 0;
    for (; i < options->target_count && !options->targets[i].of_device; i++)
        attach(&options->targets[i]);
    if (i < options->target_count) {
        let_make_places(true);
        for (; i < options->target_count; i++)
            attach(&options->targets[i]);
        let_make_places(false);
    }
    if (covered && set_attributes(AT_FDCWD, MNT, 0, (struct attributes){.set = ATTR_RDONLY}) < 0)
        fail(STEP_MOUNT_AT, MNT);
}
