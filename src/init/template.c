/*
 * The template: a mount namespace that has those of the host's mounts that hold files for jobs, and no others. The spawner
 * makes one and lives in it, and each init has a copy of it (CLONE_NEWNS). Without it an init would copy all mounts of the
 * host and take them away again: pivot_root(2) looks at all threads of the host, and before an unmount is over, each
 * processor must have been seen doing something else (RCU).
 *
 * It has no file system of a job's own: each init makes its overlays upon these mounts, and looks up in them the paths that
 * are no mounts. So a job sees the host's files as they are when it starts. When the host's mounts change, the launcher
 * starts another spawner.
 */
#include "init.h"
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <limits.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_openat2
#define SYS_openat2 437
#endif
#define TEMPLATE "/host"
/* where it is made; the same path again lies in it, empty, for the mounts that an init makes there */
#define NEW BASE

/* The mount in the template at TEMPLATE/NUMBER, by its path in the host's tree. */
static struct top {
    char *path;
    enum step step; /* for which it was taken */
    int tree;       /* until it is attached */
    bool missing;
} tops[MOUNTS_MAX]; /* the first is the host's root */
static int top_count;

static bool lies_in(const char *path, const char *top) {
    size_t length = strlen(top);
    return length == 1 || (strncmp(path, top, length) == 0 && (path[length] == '/' || !path[length]));
}

/* Where a path of the host's is found in the template: in the innermost of its mounts. */
static const char *find(const char *path) {
    static char found[PATH_MAX + sizeof TEMPLATE + 16];
    int top = 0;
    for (int i = 1; i < top_count; i++)
        if (!tops[i].missing && lies_in(path, tops[i].path) && strlen(tops[i].path) > strlen(tops[top].path))
            top = i;
    const char *rest = path + (top ? strlen(tops[top].path) : 0);
    /* a path that is cut short here is longer than the kernel takes */
    snprintf(found, sizeof found, TEMPLATE "/%d%s", top, strcmp(rest, "/") ? rest : "");
    return found;
}

/*
 * Follows no link. The launcher has already followed the operator's. A link that is there now was made since, maybe by a
 * user whose directory the operator shows, and could lead to a directory that the operator does not show. So a place with a
 * link counts as missing. Gives -1 for a missing place.
 */
static int open_place(const char *path, enum step step, const char *subject) {
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    if (fd < 0 && errno != ENOENT && errno != ENOTDIR && errno != ELOOP)
        fail(step, subject);
    return fd;
}

void open_places(struct options *options) {
    for (int i = 0; i < options->place_count; i++) {
        struct place *place = &options->places[i];
        if (place->view == VIEW_COVER)
            continue;
        begin(options, STEP_SHOW, place->path);
        place->fd = open_place(find(place->path), STEP_SHOW, place->path);
    }
}

int open_root(void) {
    int root = open(find("/"), O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        fail(STEP_ROOT, NULL);
    return root;
}

int open_above(const char *path) {
    char above[PATH_MAX];
    const char *end = strrchr(path, '/');
    snprintf(above, sizeof above, "%.*s", (int)(end - path), path);
    int directory = open(find(above), O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (directory < 0)
        fail(STEP_SCRATCH, path);
    return directory;
}

int clone_directory(enum step step, const char *path, uint64_t flags) {
    int tree = (int)syscall(SYS_open_tree, AT_FDCWD, find(path), TREE_CLONE | O_CLOEXEC);
    struct attributes attributes = {.set = flags, .propagation = MS_PRIVATE};
    if (tree < 0 || set_attributes(tree, "", AT_EMPTY_PATH, attributes) < 0)
        fail(step, path);
    return tree;
}

bool is_plain(const char *path, bool directory) {
    struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_NO_SYMLINKS};
    struct stat status;
    int fd = (int)syscall(SYS_openat2, AT_FDCWD, path, &how, sizeof how);
    bool plain = fd >= 0 && fstat(fd, &status) == 0 && (directory ? S_ISDIR(status.st_mode) : S_ISREG(status.st_mode));
    if (fd >= 0)
        close(fd);
    return plain;
}

/* A mount point is of the kind of its mount: a file, which is mounted alone, or a directory. */
static void attach(int number) {
    const struct top *top = &tops[number];
    char target[sizeof NEW TEMPLATE + 16];
    snprintf(target, sizeof target, NEW TEMPLATE "/%d", number);
    if (mkdir(target, 0700) < 0)
        fail(top->step, top->path);
    if (syscall(SYS_move_mount, top->tree, "", AT_FDCWD, target, MOVE_FROM_EMPTY_PATH) == 0)
        return;
    /* asked only now, as the root of a file server that is gone cannot be asked */
    int file = rmdir(target) < 0 ? -1 : open(target, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0);
    if (file < 0 || syscall(SYS_move_mount, top->tree, "", AT_FDCWD, target, MOVE_FROM_EMPTY_PATH) < 0)
        fail(top->step, top->path);
    close(file);
}

/* Opens a mount, or notes that it is missing. It is attached later: a mount upon NEW would hide mounts below. */
static void take(const struct options *options, const char *path, enum step step) {
    struct top *top = &tops[top_count++];
    begin(options, step, path);
    int fd = open_place(path, step, path);
    top->path = strdup(path); /* the words of a request give way to those of the next one */
    top->step = step;
    top->tree = -1;
    top->missing = fd < 0;
    if (!top->path)
        fail(step, path);
    if (fd < 0)
        return;
    top->tree = (int)syscall(SYS_open_tree, fd, "", AT_EMPTY_PATH | TREE_CLONE | O_CLOEXEC);
    if (top->tree < 0 || set_attributes(top->tree, "", AT_EMPTY_PATH, (struct attributes){.propagation = MS_PRIVATE}) < 0)
        fail(step, path);
    close(fd);
}

/* By hand the mounts are not listed: each path is taken for one. */
static void take_paths(const struct options *options) {
    take(options, "/", STEP_ROOT);
    for (int i = 0; i < options->place_count; i++)
        if (options->places[i].view != VIEW_COVER)
            take(options, options->places[i].path, STEP_SHOW);
    if (options->scratch)
        take(options, options->scratch, STEP_SCRATCH);
    if (options->cgroup)
        take(options, options->cgroup, STEP_MOUNT_SYS);
}

/* The host's root covers ours, and we take it away (pivot_root(2)). */
static void leave_host(void) {
    int host = open("/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (host < 0 || chdir(NEW) < 0)
        fail(STEP_ROOT, NULL);
    if (syscall(SYS_pivot_root, ".", ".") == 0) {
        if (fchdir(host) < 0 || umount2(".", MNT_DETACH) < 0)
            fail(STEP_ROOT, NULL);
    } else if (errno != EINVAL || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0) {
        /* no mount point (a chroot), or the kernel's first root: that one stays, below ours and out of reach */
        fail(STEP_ROOT, NULL);
    }
    if (chdir("/") < 0)
        fail(STEP_ROOT, NULL);
    close(host);
}

void make_template(const struct options *options) {
    if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
        fail(STEP_ROOT, NULL);
    for (int i = 0; i < options->mount_count; i++)
        take(options, options->mounts[i], STEP_SHOW);
    if (!options->mount_count)
        take_paths(options);
    if (mount("tmpfs", NEW, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=0700,size=1m") < 0 ||
        mkdir(NEW BASE, 0700) < 0 || mkdir(NEW TEMPLATE, 0700) < 0)
        fail(STEP_MOUNT_BASE, NEW);
    for (int i = 0; i < top_count; i++) {
        if (tops[i].missing)
            continue;
        attach(i);
        close(tops[i].tree);
    }
    leave_host();
}

static bool is_as_told(const struct options *options) {
    bool same = options->mount_count == top_count;
    for (int i = 0; same && i < top_count; i++)
        same = strcmp(options->mounts[i], tops[i].path) == 0;
    return same;
}

void enter_template(const struct options *options) {
    if (!top_count) {
        if (unshare(CLONE_NEWNS) < 0)
            fail(STEP_ROOT, NULL);
        make_template(options);
    } else if (!is_as_told(options)) {
        errno = EINVAL;
        fail(STEP_REQUEST, NULL);
    }
}

bool is_in_template(void) {
    return top_count;
}
