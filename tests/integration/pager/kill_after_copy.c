/* Kills the process as soon as UFFDIO_COPY has brought in a page that may be written to, and who waited for it
 * has had the time to do so. For LD_PRELOAD; `kill_after_copy` switches it on. */
#include <linux/userfaultfd.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

int kill_after_copy = 0;

int ioctl(int descriptor, unsigned long request, ...)
{
    va_list more;
    va_start(more, request);
    void *argument = va_arg(more, void *);
    va_end(more);
    int result = (int)syscall(SYS_ioctl, descriptor, request, argument);
    if (kill_after_copy && request == UFFDIO_COPY && result == 0
        && !(((struct uffdio_copy *)argument)->mode & UFFDIO_COPY_MODE_WP)) {
        char ended;
        (void)!read(kill_after_copy, &ended, 1); /* until the write has been done */
        kill(getpid(), SIGKILL);
    }
    return result;
}
