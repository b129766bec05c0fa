#!/bin/busybox sh
# The first process: mounts what a program expects, runs the plan, turns the machine off.
# The second serial port is for the steps' output, so that the kernel's messages do not get in between.
/bin/busybox mkdir -p /bin /sbin /proc /sys /dev /tmp /mnt
/bin/busybox --install -s /bin
. /etc/profile
mount -t proc proc /proc
mount -t sysfs sys /sys
# The kernel may have done that.
mount -t devtmpfs dev /dev 2>/dev/null
mkdir -p /dev/shm /dev/pts
mount -t tmpfs shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs tmp /tmp
chmod 1777 /tmp /dev/shm
mount -t debugfs debug /sys/kernel/debug
ifconfig lo up
ulimit -l unlimited
. /mark

if [ -n "$PROMPT" ]; then
    printf '\n%s' "$PROMPT"
    echo "vfio ADDRESS and kernel ADDRESS change a device's driver; vfio-uring is our command. exit ends the machine."
    # An interactive shell reads this.
    export ENV=/etc/profile
    setsid cttyhack sh
    poweroff -f
fi

stty -F /dev/ttyS1 raw -echo
exec 3>/dev/ttyS1

# All that writes does so in a process of its own: orphans that end interrupt the writes of this one.
tell() {
    (printf '\n%s %s\n' "$MARK" "$*" >&3)
}

begin() {
    status=1
    tell begin "$1"
}

# The devices for vfio-pci, and back.
give() {
    (vfio "$@") >&3 2>&3
}

take_back() {
    (kernel "$@") >&3 2>&3
}

# Lines of shell.
prepare() {
    sh -c ". /etc/profile; set -e; $1" >&3 2>&3 </dev/null
}

run() {
    seconds=$1
    shift
    timeout -s KILL "$seconds" "$@" >&3 2>&3 </dev/null
    status=$?
}

end() {
    # What the step has left behind; this process is spared.
    kill -9 -1 2>/dev/null
    tell end "$status"
}

. /plan
tell done
sync
poweroff -f
