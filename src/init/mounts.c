/*
 * The job's view: the parts of the host that root.c shows, nothing writable, and /run, /tmp, /dev, /proc and /sys of its
 * own. The paths that these cover stay covered: to unmount takes a capability that no job has, and in a user namespace of
 * its own a job's copies of our mounts are locked.
 */
#include "init.h"
#include "mounts.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

static const unsigned long INERT = MS_NOSUID | MS_NODEV | MS_NOEXEC;
static const char HIDDEN_FILE[] = "/run/.hidden", HIDDEN_DIRECTORY[] = "/run/.hidden-directory";

int set_attributes(int fd, const char *path, unsigned flags, struct attributes attributes) {
    return (int)syscall(SYS_mount_setattr, fd, path, flags, &attributes, sizeof attributes);
}

static void mount_tmpfs(enum step step, const char *path, unsigned long flags, const char *data) {
    if (mount("tmpfs", path, "tmpfs", flags, data) < 0)
        fail(step, path);
}

static void resize_tmpfs(uint64_t bytes) {
    char data[64];
    snprintf(data, sizeof data, "size=%llu", (unsigned long long)bytes);
    if (mount("tmpfs", "/tmp", "tmpfs", MS_REMOUNT | MS_NOSUID | MS_NODEV, data) < 0)
        fail(STEP_MOUNT_TMP, "/tmp");
}

static void make_directory(enum step step, const char *path, mode_t mode) {
    if (mkdir(path, mode) < 0)
        fail(step, path);
}

static void bind(enum step step, const char *from, const char *to) {
    if (mount(from, to, NULL, MS_BIND, NULL) < 0)
        fail(step, to);
}

/*
 * Two file systems for all of a job's own files: each one more costs the host memory for every memory cgroup that there is,
 * and time at the end of each. A job sees directories of them, bound to their places, with mount flags of their own. The
 * roots are mounted at /tmp, where the job's /tmp covers them in the end; they are root's alone, should there ever be a way
 * to them.
 */
static void mount_base(void) {
    mount_tmpfs(STEP_MOUNT_BASE, BASE, MS_NOSUID, "mode=0700,size=1m");
    static const char *const parts[] = {BASE "/root", BASE "/covers", EMPTY, BASE "/run", BASE "/dev", BASE "/sys"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        make_directory(STEP_MOUNT_BASE, parts[i], 0755);
}

static void finish_part(enum step step, const char *path, uint64_t flags) {
    if (set_attributes(AT_FDCWD, path, 0, (struct attributes){.set = ATTR_RDONLY | flags}) < 0)
        fail(step, NULL);
}

static void mount_run(int scratch) {
    bind(STEP_MOUNT_RUN, BASE "/run", "/run");
    int fd = open(HIDDEN_FILE, O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0);
    if (fd < 0)
        fail(STEP_MOUNT_RUN, HIDDEN_FILE);
    close(fd);
    make_directory(STEP_MOUNT_RUN, HIDDEN_DIRECTORY, 0);
    make_directory(STEP_MOUNT_RUN, "/run/job", 0700);
    make_directory(STEP_MOUNT_RUN, WORKSPACE_DIRECTORY, 0);
    if (scratch >= 0) {
        if (syscall(SYS_move_mount, scratch, "", AT_FDCWD, "/run/job", MOVE_FROM_EMPTY_PATH) < 0)
            fail(STEP_MOUNT_SCRATCH, "/run/job");
        close(scratch);
    }
    finish_part(STEP_MOUNT_RUN, "/run", ATTR_NODEV);
}

static void mount_dev(void) {
    static const struct {
        const char *path;
        unsigned minor;
    } devices[] = {
        {"/dev/null", 3}, {"/dev/zero", 5}, {"/dev/full", 7}, {"/dev/random", 8}, {"/dev/urandom", 9},
    };
    static const struct {
        const char *target, *path;
    } links[] = {
        {"/proc/self/fd", "/dev/fd"}, {"fd/0", "/dev/stdin"},    {"fd/1", "/dev/stdout"},
        {"fd/2", "/dev/stderr"},      {"pts/ptmx", "/dev/ptmx"},
    };
    bind(STEP_MOUNT_DEV, BASE "/dev", "/dev");
    for (size_t i = 0; i < sizeof devices / sizeof *devices; i++)
        if (mknod(devices[i].path, S_IFCHR | 0666, makedev(1, devices[i].minor)) < 0)
            fail(STEP_DEVICE, devices[i].path);
    if (mknod("/dev/tty", S_IFCHR | 0666, makedev(5, 0)) < 0)
        fail(STEP_DEVICE, "/dev/tty");
    for (size_t i = 0; i < sizeof links / sizeof *links; i++)
        if (symlink(links[i].target, links[i].path) < 0)
            fail(STEP_DEVICE, links[i].path);
    make_directory(STEP_MOUNT_DEV, "/dev/shm", 0755);
    make_directory(STEP_MOUNT_DEV, "/dev/pts", 0755);
    /*
     * A host has some thousands of terminals for all users. Threads of the kernel move the bytes that are written to one,
     * and that time is charged to no cgroup. So a job may have a few, enough for a screen and its panes.
     */
    static const char pts[] = "newinstance,ptmxmode=0666,mode=0600,max=16";
    if (mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, pts) < 0)
        fail(STEP_MOUNT_DEV, "/dev/pts");
    finish_part(STEP_MOUNT_DEV, "/dev", ATTR_NOEXEC);
}

/* Only a missing path is skipped; any other failure to hide a path ends the job. */
void hide(const char *path) {
    struct stat status;
    if (stat(path, &status) < 0) {
        if (errno == ENOENT)
            return;
        fail(STEP_HIDE, path);
    }
    /* a bind mount for a directory too: it is read-only as /run is, and costs less than a tmpfs */
    if (mount(S_ISDIR(status.st_mode) ? HIDDEN_DIRECTORY : HIDDEN_FILE, path, NULL, MS_BIND, NULL) < 0)
        fail(STEP_HIDE, path);
}

/*
 * Hidden of /proc: files that container engines mask there and a job's uid could read, and pressure, which it could write
 * (the triggers are memory of the kernel that no cgroup accounts for). The rest of the engines' lists is for a root without
 * capabilities, which no job is: the modes of kcore, timer_list, sysrq-trigger, sys, irq and bus keep it out, keys shows
 * only the reader's own, acpi and scsi name hardware, sched_debug and timer_stats are gone.
 *
 * The load of the host (stat, meminfo, loadavg) stays visible: ps and top end without it. Hence no subset=pid. And no
 * hidepid: of others there is only init, and it hides a job's own undumpable processes too.
 */
static void mount_proc(void) {
    static const char *const hidden[] = {
        "/proc/interrupts",
        "/proc/pressure",
        "/proc/latency_stats",
        "/proc/asound",
    };
    if (mount("proc", "/proc", "proc", INERT, NULL) < 0)
        fail(STEP_MOUNT_PROC, NULL);
    for (size_t i = 0; i < sizeof hidden / sizeof *hidden; i++)
        hide(hidden[i]);
}

/*
 * Of /sys only the files that programs look for: processors, memory, the job's own network interfaces. The rest is tables
 * of the firmware (an iSCSI password may be in them), sensors of temperature and power, counts of interrupts, disks,
 * addresses of the kernel, and additions of later kernels. To mask the known files would take as many mounts.
 */
/* clang-format off */
static const char *const SHOWN[] = {
    "/sys/devices/system", "/sys/devices/virtual/net", "/sys/class/net", "/sys/kernel/mm/transparent_hugepage",
};
/* clang-format on */
enum { SHOWN_COUNT = sizeof SHOWN / sizeof *SHOWN };

static void make_directories(const char *path) {
    char parent[64];
    for (const char *end = strchr(path + 1, '/'); end; end = strchr(end + 1, '/')) {
        snprintf(parent, sizeof parent, "%.*s", (int)(end - path), path);
        if (mkdir(parent, 0755) < 0 && errno != EEXIST)
            fail(STEP_MOUNT_SYS, parent);
    }
    make_directory(STEP_MOUNT_SYS, path, 0755);
}

/*
 * Show the job its own cgroup, from which runtimes learn how many processors and how much memory they have. It is bound, as a
 * new mount would be one more file system; the namespace makes it the root all the same (cgroup_namespaces(7)). It is
 * read-only, because the kernel lets every user write some of its files.
 */
static void show_cgroup(int cgroup) {
    static const char path[] = "/sys/fs/cgroup";
    make_directories(path);
    if (syscall(SYS_move_mount, cgroup, "", AT_FDCWD, path, MOVE_FROM_EMPTY_PATH) < 0)
        fail(STEP_MOUNT_SYS, path);
    close(cgroup);
}

static void mount_sys(int cgroup) {
    int trees[SHOWN_COUNT];
    if (mount("sysfs", "/sys", "sysfs", INERT | MS_RDONLY, NULL) < 0)
        fail(STEP_MOUNT_SYS, NULL);
    for (int i = 0; i < SHOWN_COUNT; i++) {
        trees[i] = (int)syscall(SYS_open_tree, AT_FDCWD, SHOWN[i], TREE_CLONE | O_CLOEXEC);
        if (trees[i] < 0 && errno != ENOENT)
            fail(STEP_MOUNT_SYS, SHOWN[i]);
    }
    bind(STEP_MOUNT_SYS, BASE "/sys", "/sys");
    for (int i = 0; i < SHOWN_COUNT; i++) {
        if (trees[i] < 0)
            continue;
        make_directories(SHOWN[i]);
        if (syscall(SYS_move_mount, trees[i], "", AT_FDCWD, SHOWN[i], MOVE_FROM_EMPTY_PATH) < 0)
            fail(STEP_MOUNT_SYS, SHOWN[i]);
        close(trees[i]);
    }
    if (cgroup >= 0)
        show_cgroup(cgroup);
    finish_part(STEP_MOUNT_SYS, "/sys", ATTR_NODEV | ATTR_NOEXEC);
}

/* The files that a job may write in memory, under one limit; last, as it covers where the rest was made. */
static void mount_tmp(const struct options *options) {
    bool with_home = !options->scratch;
    mount_tmpfs(STEP_MOUNT_TMP, "/tmp", MS_NOSUID | MS_NODEV, "mode=0700");
    make_directory(STEP_MOUNT_TMP, "/tmp/shm", 01777);
    bind(STEP_MOUNT_DEV, "/tmp/shm", "/dev/shm");
    if (with_home) {
        make_directory(STEP_MOUNT_TMP, "/tmp/job", 0700);
        bind(STEP_MOUNT_SCRATCH, "/tmp/job", "/run/job");
    }
    make_directory(STEP_MOUNT_TMP, "/tmp/tmp", 01777);
    bind(STEP_MOUNT_TMP, "/tmp/tmp", "/tmp");
    if (options->image && !is_plain("/var/tmp", true))
        return;
    if (mount("/tmp", "/var/tmp", NULL, MS_BIND, NULL) < 0 && errno != ENOENT)
        fail(STEP_MOUNT_TMP, "/var/tmp");
}

/* A directory that outlives the job: a mount of it, which the launcher has made. */
static void mount_workspace(int tree) {
    if (syscall(SYS_move_mount, tree, "", AT_FDCWD, WORKSPACE_DIRECTORY, MOVE_FROM_EMPTY_PATH) < 0)
        fail(STEP_MOUNT_WORKSPACE, WORKSPACE_DIRECTORY);
    close(tree);
}

void make_mounts(struct options *options) {
    umask(0);
    int scratch = -1, cgroup = -1;
    if (options->scratch) /* the one place of the host that a job may write to */
        scratch = clone_directory(STEP_SCRATCH, options->scratch, ATTR_NOSUID | ATTR_NODEV);
    if (options->cgroup)
        cgroup = clone_directory(STEP_MOUNT_SYS, options->cgroup, ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV | ATTR_NOEXEC);
    if (!options->image)
        open_places(options);
    mount_base();
    enter_root(options);
    mount_run(scratch);
    if (!options->image)
        show_places(options);
    make_names(options);
    mount_dev();
    mount_proc();
    mount_sys(cgroup);
    mount_tmp(options);
}

void finish_mounts(struct options *options) {
    if (options->tmp_bytes)
        resize_tmpfs(options->tmp_bytes);
    if (!options->scratch && chown("/run/job", options->uid, options->gid) < 0)
        fail(STEP_MOUNT_SCRATCH, "/run/job");
    finish_names(options);
    if (options->workspace)
        mount_workspace(options->workspace_fd);
    if (options->target_count)
        mount_offered(options);
    /* Last, so that a path is looked up as the job would: one that our own mounts cover is gone already. They are the host's. */
    for (int i = 0; i < options->hide_count && !options->image; i++) {
        begin(options, STEP_HIDE, options->hides[i]);
        hide(options->hides[i]);
    }
    forget_paths(options);
}
