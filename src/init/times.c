/*
 * The times of output, in a file beside it: records of 16 bytes (struct time_record), in order.
 *
 * At most one for each interval, which is 4 ms at first and doubles with every 16,384 records: so the file grows by 256 KiB
 * with each doubling of the job's age, to 7 MiB in a hundred years, and a time is late by at most 4 ms or an 8,000th of
 * that age. It is no part of the output: a record that cannot be written holds up nothing.
 */
#include "init.h"

#include <unistd.h>

enum { INTERVAL_MS = 4, RECORDS_PER_DOUBLING = 1 << 14, DOUBLINGS_MAX = 30, RETRY_MS = 250 };
static const int64_t NS_PER_MS = 1000000;
_Static_assert(sizeof(struct time_record) == 16, "what output/times.py reads");

static int64_t interval_ns(const struct times *times) {
    uint64_t doublings = times->count / RECORDS_PER_DOUBLING;
    return INTERVAL_MS * NS_PER_MS << (doublings < DOUBLINGS_MAX ? doublings : DOUBLINGS_MAX);
}

struct times open_times(int fd, uint64_t end) {
    return (struct times){.fd = fd, .end = end};
}

/*
 * The delay until the held record is written. The clock may be set back: then at once, but for a write that has just
 * failed.
 */
static int64_t due_in_ns(const struct times *times, int64_t now) {
    int64_t due = now < times->written_ns ? now : times->written_ns + interval_ns(times);
    int64_t retry_in = times->retry_ns - now;
    if (due < times->retry_ns && retry_in <= RETRY_MS * NS_PER_MS)
        due = times->retry_ns;
    return due > now ? due - now : 0;
}

int held_time_ms(const struct times *times) {
    if (!times->held.end)
        return -1;
    return (int)((due_in_ns(times, realtime_ns()) + NS_PER_MS - 1) / NS_PER_MS);
}

void write_held_time(struct times *times, bool at_once) {
    if (!times->held.end)
        return;
    int64_t now = realtime_ns();
    if (!at_once && due_in_ns(times, now))
        return;
    off_t place = (off_t)(times->count * sizeof times->held);
    if (pwrite(times->fd, &times->held, sizeof times->held, place) != sizeof times->held) {
        times->retry_ns = now + RETRY_MS * NS_PER_MS;
        return;
    }
    times->count++;
    /* when it was written, and not its own time: or two would come in each interval */
    times->written_ns = now;
    times->held.end = 0;
}

void note_time(struct times *times, int64_t ns, size_t bytes) {
    times->end += bytes;
    if (times->fd < 0)
        return;
    times->held = (struct time_record){.ns = ns, .end = times->end};
    /* `now` is when it was read, which spares asking for the time again */
    if (!due_in_ns(times, ns))
        write_held_time(times, true);
}

void forget_times(struct times *times, uint64_t end) {
    if (times->fd >= 0 && ftruncate(times->fd, 0) < 0)
        times->fd = -1; /* no times are better than wrong ones */
    *times = open_times(times->fd, end);
}
