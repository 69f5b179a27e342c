/* The terminal of a job or a session: in the job's own devpts, and its user's. */
#include "init.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <termios.h>
#include <unistd.h>

void resize_terminal(int master, const struct orders *orders) {
    struct winsize size = {
        .ws_row = orders->rows, .ws_col = orders->columns, .ws_xpixel = orders->width, .ws_ypixel = orders->height};
    ioctl(master, TIOCSWINSZ, &size); /* tells the foreground processes, where it has changed */
}

/* The size is there before the command, which may look at it first of all. */
int open_terminal(const struct options *options, int *slave) {
    int locked = 0;
    struct orders orders;
    /* devpts gives a new terminal to the user that opens it */
    setfsgid(options->gid);
    setfsuid(options->uid);
    int master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC), error = errno;
    setfsuid(0);
    setfsgid(0);
    errno = error;
    if (master < 0 || ioctl(master, TIOCSPTLCK, &locked) < 0)
        fail(STEP_TERMINAL, NULL);
    /* not by its name, which is the job's to replace: it need not be the file that is there then */
    *slave = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (*slave < 0)
        fail(STEP_TERMINAL, NULL);
    if (pread(options->control_fd, &orders, sizeof orders, 0) == sizeof orders)
        resize_terminal(master, &orders);
    return master;
}
