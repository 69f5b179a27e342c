/*
 * pjw-archive: packs a file or a directory into a tar archive, or unpacks one. It runs in a job, as the job's user, by a
 * descriptor (session.c of pjw-init): the root of a job may hold no program at all.
 *
 * It has no privilege to lose. Archives may be hostile all the same: whatever is in one, nothing is made or changed outside of
 * the directory that was named, and no file is there before it is whole.
 *
 * By hand, without meson:
 *   gcc -std=gnu17 -Wall -Wextra -Werror -Os -static -o pjw-archive *.c
 */
#ifndef PJW_ARCHIVE_H
#define PJW_ARCHIVE_H

#define _GNU_SOURCE
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { BLOCK_BYTES = 512, BUFFER_BYTES = 128 << 10, NAME_MAX_BYTES = 4096, EXTENDED_MAX_BYTES = 1 << 20 };
enum { EXIT_CANNOT = 1, EXIT_WRONG_USAGE = 2, EXIT_NOTHING = 3 };

/* A header as POSIX has it (pax(1), "ustar Interchange Format"). */
struct header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8];
    char type;
    char linkname[100], magic[6], version[2], uname[32], gname[32], devmajor[8], devminor[8], prefix[155], unused[12];
};
_Static_assert(sizeof(struct header) == BLOCK_BYTES, "a header is a block");

/* main.c */
/* Say "error: cannot DO NAME: WHY", remove the half-made file, and end. Without *why* it is errno's. */
_Noreturn void cannot(const char *doing, const char *name, const char *why);
/* "note: left out NAME: WHY"; many of them are counted, and told at the end. */
void left_out(const char *name, const char *why);
void tell_left_out(void);
/* openat2(2), without magic links; -1 and errno. */
int open_beneath(int directory, const char *path, uint64_t flags, uint64_t resolve);

/* pack.c: *path*, a file or a directory, to stdout */
void pack(const char *path);
/*
 * All that the patterns on stdin match, which are paths below the working directory, each ended by NUL: `*`, `?` and `[...]`
 * within a name, `**` for any directories. A directory that matches is taken whole. Gives whether anything did.
 */
bool collect(void);

/*
 * unpack.c: stdin into the directory *path*, which is made where it is missing. With a *name* everything in the archive must be
 * below that name: it becomes `path/name` where *path* is a directory, or else *path* itself, as with cp(1).
 */
void unpack(const char *name, const char *path);
/* Remove the half-made file; may be called at any moment. */
void remove_half_made(void);

#endif
