#!/bin/sh
# host COMMAND ARGUMENT...: the host does it to this machine. Waits for the answer, 40 s at most; fails with the host's reason.
# One at a time: the port can be opened once.
tries=100
until exec 4<>/dev/vport0p1; do
    tries=$((tries - 1))
    [ $tries -gt 0 ] || exit 1
    sleep 0.1
done 2>/dev/null
echo "$$ $*" >&4
while read -t 40 -r number answer <&4; do
    # Another number is that of one that was killed before its answer came.
    [ "$number" = $$ ] || continue
    [ "$answer" = ok ] && exit
    echo "host $*: $answer" >&2
    exit 1
done
echo "host $*: no answer" >&2
exit 1
