/*
 * The job's root: the visible file systems of the host, each as a separate overlay. An overlay has its own inodes, so
 * a job can neither lock the host's files nor watch them with inotify, nor reach a socket or a FIFO by its path. Two jobs
 * have two overlays, so they share none of that either. With one overlay for all jobs they would, and files that the host
 * replaced would stay old (both tried).
 *
 * The host's other mounts are in no mount namespace of a job, so no job keeps a disk busy.
 */
#include "init.h"
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/securebits.h>
#include <stdio.h>
#include <string.h>
#include <sys/fsuid.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <unistd.h>

/* missing in <sys/mount.h> and <sys/statvfs.h> of older versions of glibc */
#ifndef MS_NOSYMFOLLOW
#define MS_NOSYMFOLLOW 256
#endif
#ifndef ST_NOSYMFOLLOW
#define ST_NOSYMFOLLOW 0x2000 /* linux/statfs.h */
#endif

static const unsigned long SEEN = MS_RDONLY | MS_NOSUID | MS_NODEV;
static const char NEW_ROOT[] = BASE "/root", COVERS[] = BASE "/covers";
/*
 * Without an upper layer there must be two lower ones: the second is empty. The first is ".", where we are then:
 * so no path need be escaped, and the job's table of mounts names none. The rest is as the kernel's defaults can
 * be on any machine (Documentation/filesystems/overlayfs.rst); "xino=on" would have each mount write to the kernel's log.
 */
static const char LAYERS[] = "lowerdir=.:" EMPTY ",xino=off,index=off,metacopy=off,nfs_export=off,redirect_dir=nofollow";

/* An overlay is a mount of its own, so it must repeat the restrictions of its lower mount in addition to SEEN. */
static unsigned long forbidden(int directory, const char *target) {
    struct statvfs status;
    if (fstatvfs(directory, &status) < 0)
        fail(STEP_SHOW, target);
    return (status.f_flag & ST_NOEXEC ? MS_NOEXEC : 0) | (status.f_flag & ST_NOSYMFOLLOW ? MS_NOSYMFOLLOW : 0);
}

/* False for a file, for some file systems, and where overlayfs is missing or may not be used. */
static bool overlay(int directory, const char *target) {
    unsigned long flags = SEEN | forbidden(directory, target);
    if (fchdir(directory) == 0 && mount("overlay", target, "overlay", flags, LAYERS) == 0)
        return true;
    if (errno != EINVAL && errno != ENOTDIR && errno != ENODEV && errno != EOPNOTSUPP && errno != EPERM && errno != EACCES)
        fail(STEP_SHOW, target);
    return false;
}

static bool differ_in_kind(int fd, const char *path) {
    struct stat from, to;
    return fstat(fd, &from) == 0 && stat(path, &to) == 0 && S_ISDIR(from.st_mode) != S_ISDIR(to.st_mode);
}

/*
 * Where an overlay cannot or must not show a file system: the host's own, read-only. A file cannot be shown upon a
 * directory (EINVAL): the owner of the parent directory may have put it there, and that place is missing. Asked only then,
 * as a server that is gone would not answer.
 */
static void bind_read_only(int from, const char *target) {
    struct attributes attributes = {.set = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, .propagation = MS_PRIVATE};
    int tree = (int)syscall(SYS_open_tree, from, "", AT_EMPTY_PATH | TREE_CLONE | O_CLOEXEC);
    if (tree < 0 || set_attributes(tree, "", AT_EMPTY_PATH, attributes) < 0 ||
        (syscall(SYS_move_mount, tree, "", AT_FDCWD, target, MOVE_FROM_EMPTY_PATH) < 0 &&
         !(errno == EINVAL && differ_in_kind(from, target))))
        fail(STEP_SHOW, target);
    close(tree);
}

static bool is_root(const struct place *place) {
    return strcmp(place->path, "/") == 0;
}

/*
 * The kernel writes to an upper layer as the user that has mounted the overlay. That is the owner of the layer here, or a
 * job could have the blocks that a file system keeps for root. Not without our capabilities, which overlayfs needs.
 */
static int mount_as_owner(uid_t owner, unsigned long flags, const char *data) {
    int bits = prctl(PR_GET_SECUREBITS);
    if (bits < 0 || prctl(PR_SET_SECUREBITS, bits | SECBIT_NO_SETUID_FIXUP) < 0)
        fail(STEP_OVERLAY, NULL);
    setfsuid(owner);
    int result = mount("overlay", NEW_ROOT, "overlay", flags, data), error = errno;
    setfsuid(0);
    if (prctl(PR_SET_SECUREBITS, bits) < 0)
        fail(STEP_OVERLAY, NULL);
    errno = error;
    return result;
}

/*
 * A root of the job's own: the image, and above it the job's changes, which are in `upper` beside its scratch directory.
 * That goes with the job, so it need never be synced (volatile). Where the kernel cannot do that, the root is read-only.
 */
static bool overlay_image(int number, bool writes) {
    char lower[] = BASE "/image0", data[256];
    struct stat upper;
    if (stat("upper", &upper) < 0)
        fail(STEP_OVERLAY, NULL);
    lower[sizeof lower - 2] = (char)('0' + number);
    if (writes)
        snprintf(data, sizeof data,
                 "lowerdir=%s,upperdir=upper,workdir=work,xino=off,index=off,metacopy=off,nfs_export=off,redirect_dir=on,"
                 "volatile",
                 lower);
    else /* there must be two layers; the upper one has the owner and mode of the root itself */
        snprintf(data, sizeof data,
                 "lowerdir=upper:%s,xino=off,index=off,metacopy=off,nfs_export=off,redirect_dir=nofollow", lower);
    return mount_as_owner(upper.st_uid, MS_NOSUID | MS_NODEV | (writes ? 0 : MS_RDONLY), data) == 0;
}

static void show_image(struct options *options) {
    static const int cannot[] = {EINVAL, EPERM, EOPNOTSUPP, ENOSYS};
    int own = open_above(options->scratch);
    bool shown = false;
    if (fchdir(own) < 0)
        fail(STEP_OVERLAY, NULL);
    close(own);
    /* An overlay takes layers of this namespace alone (clone_private_mount() before Linux 6.15). */
    for (int i = 0; i < options->image_count; i++) {
        char lower[] = BASE "/image0";
        lower[sizeof lower - 2] = (char)('0' + i);
        if (mkdir(lower, 0700) < 0 ||
            syscall(SYS_move_mount, options->image_fds[i], "", AT_FDCWD, lower, MOVE_FROM_EMPTY_PATH) < 0)
            fail(STEP_OVERLAY, NULL);
        close(options->image_fds[i]);
    }
    /* the second one maps no users, so a write of a job there would be refused anyway */
    for (int way = 0; !shown && way < 1 + options->image_count; way++) {
        bool writes = way == 0;
        if (writes && options->image_read_only)
            continue;
        shown = overlay_image(way == 2, writes);
        int error = errno;
        bool other = false; /* whether another way may be one */
        for (size_t i = 0; i < sizeof cannot / sizeof *cannot; i++)
            other |= error == cannot[i];
        errno = error;
        if (!shown && (!other || way == options->image_count))
            fail(STEP_OVERLAY, NULL);
    }
}

/* The maker of the image may have put links where our own mounts go. They would lead nowhere but into the image itself. */
static void require_points(void) {
    static const char *const points[] = {BASE, "/dev", "/proc", "/run", "/sys"};
    for (size_t i = 0; i < sizeof points / sizeof *points; i++)
        if (!is_plain(points[i], true))
            fail(STEP_IMAGE, points[i]);
}

void enter_root(struct options *options) {
    bool bound = options->place_count && is_root(options->places) && options->places[0].view == VIEW_BIND;
    int host = open_root(), base = open(BASE, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (base < 0)
        fail(STEP_ROOT, NULL);
    begin(options, STEP_ROOT, NULL);
    if (options->image)
        show_image(options);
    else if (bound || !overlay(host, NEW_ROOT))
        bind_read_only(host, NEW_ROOT);
    close(host);
    /*
     * Not pivot_root(2), which looks at all threads of the host. The template stays, below ours and out of reach: ".." of a
     * mount upon the namespace's own root is the same directory, and in a user namespace of a job's own none of our mounts
     * comes off.
     */
    if (chdir(NEW_ROOT) < 0 || mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0)
        fail(STEP_ROOT, NULL);
    if (options->image)
        require_points();
    if (fchdir(base) < 0 || mount(".", BASE, NULL, MS_MOVE, NULL) < 0 || chdir("/") < 0)
        fail(STEP_ROOT, BASE);
    close(base);
}

/* It may be there already; and in a read-only file system none is made. */
static void make_directory(const char *path, mode_t mode) {
    if (mkdir(path, mode) < 0 && errno != EEXIST && errno != EROFS && errno != ENOENT && errno != ENOTDIR &&
        errno != EACCES && errno != EPERM)
        fail(STEP_SHOW, path);
}

/* A place within a covered directory has no mount point yet; elsewhere none can be made. */
static void make_mount_point(char *path) {
    if (access(path, F_OK) == 0)
        return;
    for (char *end = strchr(path + 1, '/'); end; end = strchr(end + 1, '/')) {
        *end = '\0';
        make_directory(path, 0755);
        *end = '/';
    }
    make_directory(path, 0755);
}

static void show(const struct place *place) {
    if (place->fd < 0)
        return;
    if (!is_root(place)) {
        make_mount_point(place->path);
        if (access(place->path, F_OK) == 0 && (place->view == VIEW_BIND || !overlay(place->fd, place->path)))
            bind_read_only(place->fd, place->path);
    }
    close(place->fd);
}

/* An empty directory; one for each cover, as something may be shown in it. */
static void cover(struct place *place, int number) {
    char path[sizeof COVERS + 16];
    struct stat status;
    if (stat(place->path, &status) < 0) {
        if (errno == ENOENT || errno == ENOTDIR)
            return;
        fail(STEP_HIDE, place->path);
    }
    if (!S_ISDIR(status.st_mode)) {
        hide(place->path);
        return;
    }
    snprintf(path, sizeof path, "%s/%d", COVERS, number);
    if (mkdir(path, 0755) < 0 || mount(path, place->path, NULL, MS_BIND, NULL) < 0)
        fail(STEP_HIDE, place->path);
    place->fd = open(place->path, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (place->fd < 0)
        fail(STEP_HIDE, place->path);
}

void show_places(struct options *options) {
    for (int i = 0; i < options->place_count; i++) {
        struct place *place = &options->places[i];
        begin(options, place->view == VIEW_COVER ? STEP_HIDE : STEP_SHOW, place->path);
        if (place->view == VIEW_COVER)
            cover(place, i);
        else
            show(place);
    }
    make_directory("/var/tmp", 01777); /* where /var is covered, or shown without it: there is one in that case, or none */
    for (int i = 0; i < options->place_count; i++) {
        struct place *place = &options->places[i];
        if (place->view != VIEW_COVER || place->fd < 0)
            continue;
        struct attributes attributes = {.set = ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV};
        if (set_attributes(place->fd, "", AT_EMPTY_PATH, attributes) < 0)
            fail(STEP_HIDE, place->path);
        close(place->fd);
    }
}
