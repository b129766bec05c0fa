# The guest's own driver on the two network cards that the host serves, with a cable between them. Each is in a network
# namespace of its own, so that packets take the cable.
took() {
    echo "$(cut -d ' ' -f 1 /proc/uptime) s: $*"
}
trap '[ $? = 0 ] || dmesg | tail -n 12' EXIT
interface() {
    ls "/sys/bus/pci/devices/$1/net" 2>/dev/null
}
named() {
    [ -n "$(interface "$1")" ]
}
wait_for 20 named 0000:00:05.0
wait_for 20 named 0000:00:06.0
one=$(interface 0000:00:05.0)
two=$(interface 0000:00:06.0)

unshare -n sleep 600 &
other=$!
# The name of a namespace says which it is.
apart() {
    [ "$(readlink /proc/$other/ns/net)" != "$(readlink /proc/self/ns/net)" ]
}
wait_for 10 apart
ip link set "$two" netns $other

# here COMMAND... and there COMMAND...: on the first card, and on the second.
here() {
    "$@"
}
there() {
    nsenter -t $other -n "$@"
}
# Nothing is sent but what is here: multicast that the other end has not asked for is not received.
quiet='for file in /proc/sys/net/ipv6/conf/*/disable_ipv6; do [ ! -e $file ] || echo 1 >$file; done'
here sh -c "$quiet"
there sh -c "$quiet"
here ip addr add 10.0.0.1/24 dev "$one"
there ip addr add 10.0.0.2/24 dev "$two"
here ip link set "$one" up
there ip link set "$two" up
linked() {
    here ip link show dev "$one" | grep -q LOWER_UP && there ip link show dev "$two" | grep -q LOWER_UP
}
wait_for 20 linked
took link

# pings SIZE COUNT: all are answered.
pings() {
    ping -q -c "$2" -i 0.01 -w 30 -s "$1" 10.0.0.2 >/tmp/pings || { cat /tmp/pings; return 1; }
    took "pings of $1 bytes: $(tail -n 2 /tmp/pings | tr '\n' ' ')"
    grep -q "^$2 packets transmitted, $2 packets received, 0% packet loss" /tmp/pings
}

# Packets that one card has sent and the other has not received, in each direction.
counter() {
    "$1" sed -n "s/^ *$2: *//p" /proc/net/dev | awk -v field="$3" '{ print $field }'
}
missing() {
    echo $(($(counter here "$one" 10) - $(counter there "$two" 2))) $(($(counter there "$two" 10) - $(counter here "$one" 2)))
}
missing_are() {
    [ "$(missing)" = "$1" ]
}

# transfer FROM TO ADDRESS PORT: 64 MiB by TCP, without the loss of a packet.
listens() {
    "$1" cat /proc/net/tcp /proc/net/tcp6 | grep -q "$(printf ':%04X 0*:0000 0A' "$2")"
}
transfer() {
    before=$(missing)
    # The listener's input stays open, and so its half of the connection.
    "$2" timeout 60 nc -l -p "$4" <>/tmp/open >/tmp/got &
    receiver=$!
    wait_for 10 listens "$2" "$4"
    took "$1 to $2, port $4"
    "$1" timeout 60 nc "$3" "$4" </tmp/data || { echo "the sender failed: $?"; return 1; }
    wait $receiver || { echo "the receiver failed: $?, with $(wc -c </tmp/got) bytes"; return 1; }
    took "all is there"
    if [ "$(sha256sum </tmp/got)" != "$sum" ]; then
        cmp /tmp/data /tmp/got
        return 1
    fi
    wait_for 5 missing_are "$before" || { echo "packets lost on the way, in each direction: $(missing)"; return 1; }
}

mkfifo /tmp/open
dd if=/dev/urandom of=/tmp/data bs=1M count=64 2>/dev/null
sum=$(sha256sum </tmp/data)
pings 56 100
pings 1400 20
transfer here there 10.0.0.2 5001
transfer there here 10.0.0.1 5002

# With long packets the cards' buffers are other ones, and a packet has several.
here ip link set "$one" mtu 9000
there ip link set "$two" mtu 9000
wait_for 20 linked
took link
pings 8900 20
transfer here there 10.0.0.2 5003

# No side has seen an error or lost a packet. (TCP may have sent one twice, because the answer was late.)
# After the name: bytes, packets, errs, drop, fifo, frame, compressed, multicast, and of sending
# bytes, packets, errs, drop, fifo, colls, carrier, compressed.
clean() {
    "$1" cat /proc/net/dev | sed 's/:/ /' | awk -v name="$2" '
        $1 == name { print; found = 1; bad = $4 + $5 + $6 + $7 + $12 + $13 + $14 + $15 + $16 }
        END { exit !found || bad }' || { echo "$2 has errors"; return 1; }
    "$1" awk '
        /^Tcp:/ && named { for (i = 2; i <= NF; i++) value[name[i]] = $i }
        /^Tcp:/ && !named { for (i = 2; i <= NF; i++) name[i] = $i; named = 1 }
        END {
            for (i in name) if (name[i] ~ /Segs|InErrs|InCsumErrors/) printf "%s %s  ", name[i], value[name[i]]
            print ""
            exit !named || value["InErrs"] + value["InCsumErrors"]
        }' /proc/net/snmp || { echo "TCP has errors at $2"; return 1; }
}
clean here "$one"
clean there "$two"
grep -e "$one" -e "$two" /proc/interrupts
! dmesg | grep -i 'NETDEV WATCHDOG\|igb.*\(error\|hang\|timeout\)'
