# The guest's own driver on the controller that the host serves: a file system is made, written, and read back after a remount.
disk=/dev/nvme0n1
wait_for 20 [ -b $disk ]
[ "$(cat /sys/class/nvme/nvme0/state)" = live ]
grep nvme /proc/interrupts
# By its path: the shell has a smaller one of its own.
/bin/mke2fs -q -F -t ext4 $disk
mount -t ext4 $disk /mnt
for file in 1 2 3 4 5 6 7 8; do
    dd if=/dev/urandom of=/mnt/$file bs=64k count=32 2>/dev/null
done
mkdir /mnt/small
for file in $(seq 100); do
    echo "file $file" >/mnt/small/$file
done
(cd /mnt && find . -type f -exec sha256sum {} + | sort -k 2) >/tmp/sums
[ "$(wc -l </tmp/sums)" = 108 ]
umount /mnt
/bin/e2fsck -fn $disk
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 $disk /mnt
(cd /mnt && sha256sum -c /tmp/sums >/tmp/checked) || { grep -v OK /tmp/checked; exit 1; }
rm -r /mnt/small
umount /mnt
/bin/e2fsck -fn $disk
! dmesg | grep -i 'nvme.*\(error\|timeout\|abort\)'
