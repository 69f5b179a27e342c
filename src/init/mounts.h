/* The functions that mounts.c and root.c share. */
#ifndef PJW_INIT_MOUNTS_H
#define PJW_INIT_MOUNTS_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Not from linux/mount.h, which clashes with sys/mount.h in glibc 2.36; the numbers are for every machine. */
#ifndef SYS_open_tree
#define SYS_open_tree 428
#define SYS_move_mount 429
#endif
#ifndef SYS_mount_setattr
#define SYS_mount_setattr 442
#endif
enum { ATTR_RDONLY = 1, ATTR_NOSUID = 2, ATTR_NODEV = 4, ATTR_NOEXEC = 8 };
enum { TREE_CLONE = 1, MOVE_FROM_EMPTY_PATH = 4 };
struct attributes {
    uint64_t set, clear, propagation, userns_fd;
};

/* Here a tmpfs has most of the directories that a job has of its own; in the end the job's /tmp covers it. */
#define BASE "/tmp"
#define EMPTY BASE "/empty"

/* mounts.c */
int set_attributes(int fd, const char *path, unsigned flags, struct attributes attributes);
void hide(const char *path);

/* template.c: the parts that init takes from the template, by paths of the host's */
int open_root(void);
int open_above(const char *path); /* the directory that it is in */
void open_places(struct options *options);
/* a mount of its own, which is attached nowhere */
int clone_directory(enum step step, const char *path, uint64_t flags);

/* whether there is a file or directory at a path of the job's own root, without a link on the way */
bool is_plain(const char *path, bool directory);

/* root.c, in this order: */
void enter_root(struct options *options); /* BASE moves along */
void show_places(struct options *options);

/* names.c: make_names runs in the job's tree while BASE is mounted, finish_names when the user is known */
void make_names(const struct options *options);
void finish_names(const struct options *options);

#endif
