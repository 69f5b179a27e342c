/*
 * The network of a job has nothing but a loopback interface. The job reaches its allowed names through sockets that listen
 * there and are accepted outside, by pjwd-egress: a socket belongs to the network namespace in which it was made, whichever
 * process has it then. Init makes them while it is root, as ports below 1024 may be among them, and keeps none.
 */
#include "init.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

void join_network(const struct options *options) {
    if (setns(options->link_fd, CLONE_NEWNET) < 0)
        fail(STEP_LINK, NULL);
    close(options->link_fd);
}

/*
 * A port below 1024 takes CAP_NET_BIND_SERVICE, which pjwd has no other need of, or a network that gives such ports to
 * every process: this one does for a moment. In the job's own /proc, as that of the host may be read-only.
 */
static void set_first_free_port(const char *number) {
    int fd = open("/proc/sys/net/ipv4/ip_unprivileged_port_start", O_WRONLY | O_CLOEXEC);
    if (fd < 0 || write(fd, number, strlen(number)) < 0)
        fail(STEP_LISTEN, "a port below 1024");
    close(fd);
}

static int bind_to(int fd, const struct sockaddr_in *address) {
    int bound = bind(fd, (const struct sockaddr *)address, sizeof *address);
    if (bound == 0 || errno != EACCES)
        return bound;
    set_first_free_port("0");
    bound = bind(fd, (const struct sockaddr *)address, sizeof *address);
    int error = errno;
    set_first_free_port("1024");
    errno = error;
    return bound;
}

static int listen_at(const struct listener *listener) {
    char text[INET_ADDRSTRLEN], subject[INET_ADDRSTRLEN + 8];
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = listener->port, .sin_addr.s_addr = listener->address};
    inet_ntop(AF_INET, &listener->address, text, sizeof text);
    snprintf(subject, sizeof subject, "%s:%u", text, ntohs(listener->port));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    /* earlier connections may still be there when a later launcher has this made again */
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) < 0 || bind_to(fd, &address) < 0 ||
        listen(fd, SOMAXCONN) < 0)
        fail(STEP_LISTEN, subject);
    return fd;
}

void hand_over_listeners(const struct options *options) {
    int fds[LISTENERS_MAX];
    for (int i = 0; i < options->listener_count; i++)
        fds[i] = listen_at(&options->listeners[i]);
    report_listening(fds, (size_t)options->listener_count);
    for (int i = 0; i < options->listener_count; i++)
        close(fds[i]);
}
