/*
 * The network of a job has nothing but a loopback interface. What the job may reach by name it reaches through sockets that
 * listen there and are accepted outside, by pjwd-egress: a socket belongs to the network namespace in which it was made,
 * whoever has it then. Init makes them while it is root, as ports below 1024 may be among them, and keeps none.
 */
#include "init.h"

#include <arpa/inet.h>
#include <sched.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

void join_network(const struct options *options) {
    if (setns(options->link_fd, CLONE_NEWNET) < 0)
        fail(STEP_LINK, NULL);
    close(options->link_fd);
}

static int listen_at(const struct listener *listener) {
    char text[INET_ADDRSTRLEN], subject[INET_ADDRSTRLEN + 8];
    struct sockaddr_in address = {
        .sin_family = AF_INET, .sin_port = listener->port, .sin_addr.s_addr = listener->address};
    inet_ntop(AF_INET, &listener->address, text, sizeof text);
    snprintf(subject, sizeof subject, "%s:%u", text, ntohs(listener->port));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    /* connections of before may still be there when a later launcher has this made again */
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &(int){1}, sizeof(int)) < 0 ||
        bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, SOMAXCONN) < 0)
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
