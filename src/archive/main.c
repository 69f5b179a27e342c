/* The command line, and words. */
#include "archive.h"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_openat2
#define SYS_openat2 437
#endif
enum { NOTES_MAX = 20 };

static unsigned long notes;
/* init has room for one line: the first note about a file left out, and the number of further ones */
static bool one_line;
static char first_note[NAME_MAX_BYTES + 64];

/* One write for each line: a reader may follow. Characters of a name are the reader's to make printable. */
static void say(const char *before, const char *name, const char *after, const char *why) {
    static char line[2 * NAME_MAX_BYTES];
    size_t length = 0;
    const char *parts[] = {before, name, after, why, "\n"};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        for (const char *each = parts[i]; *each && length < sizeof line - 1; each++)
            line[length++] = *each == '\n' && i != 4 ? '?' : *each;
    if (write(STDERR_FILENO, line, length) < 0)
        return;
}

/* A name that is packed from the working directory begins with the directory. */
static const char *plain(const char *name) {
    return name[0] == '.' && name[1] == '/' && name[2] ? name + 2 : name;
}

void cannot(const char *doing, const char *name, const char *why) {
    char words[128], before[64];
    if (!why) {
        snprintf(words, sizeof words, "%s", strerror(errno));
        words[0] = (char)tolower((unsigned char)words[0]);
        why = words;
    }
    remove_half_made();
    tell_left_out();
    snprintf(before, sizeof before, "error: cannot %s%s", doing, *name ? " " : "");
    say(before, plain(name), ": ", why);
    _exit(EXIT_CANNOT);
}

void left_out(const char *name, const char *why) {
    if (one_line && !notes++)
        snprintf(first_note, sizeof first_note, "%s: %s", plain(name), why);
    else if (!one_line && notes++ < NOTES_MAX)
        say("note: left out ", plain(name), ": ", why);
}

void tell_left_out(void) {
    char count[32] = "";
    if (one_line && notes) {
        if (notes > 1)
            snprintf(count, sizeof count, "; and %lu more", notes - 1);
        say("note: left out ", first_note, count, "");
    }
    if (one_line || notes <= NOTES_MAX)
        return;
    snprintf(count, sizeof count, "%lu", notes - NOTES_MAX);
    say("note: left out ", count, " more", "");
}

int open_beneath(int directory, const char *path, uint64_t flags, uint64_t resolve) {
    struct open_how how = {.flags = flags | O_CLOEXEC, .resolve = resolve | RESOLVE_NO_MAGICLINKS};
    return (int)syscall(SYS_openat2, directory, path, &how, sizeof how);
}

static void end_by(int number) {
    remove_half_made();
    _exit(128 + number);
}

int main(int argc, char **argv) {
    /* it was executed by a descriptor, whose number would be its name */
    prctl(PR_SET_NAME, "pjw-archive");
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN); /* beyond a limit of the size of files a write fails, and we say so */
    signal(SIGHUP, end_by);
    signal(SIGTERM, end_by);
    signal(SIGINT, end_by);
    if (argc == 3 && strcmp(argv[1], "pack") == 0) {
        pack(argv[2]);
    } else if (argc == 2 && strcmp(argv[1], "collect") == 0) {
        one_line = true;
        if (!collect()) {
            tell_left_out();
            return EXIT_NOTHING;
        }
    } else if (argc == 4 && strcmp(argv[1], "unpack") == 0) {
        unpack(argv[2], argv[3]);
    } else {
        say("usage: pjw-archive pack PATH | pjw-archive collect | pjw-archive unpack NAME PATH", "", "", "");
        return EXIT_WRONG_USAGE;
    }
    tell_left_out();
    return 0;
}
