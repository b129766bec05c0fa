# For init, scripts and people: where programs are, and who drives a device.
export PATH=/bin:/sbin HOME=/tmp TMPDIR=/tmp TERM=dumb LD_LIBRARY_PATH=/lib

# vfio ADDRESS...: vfio-pci gets the devices.
vfio() {
    for device in "$@"; do
        folder=/sys/bus/pci/devices/$device
        [ -e "$folder" ] || { echo "there is no device $device"; return 1; }
        [ -e "$folder/driver" ] && echo "$device" >"$folder/driver/unbind"
        echo vfio-pci >"$folder/driver_override"
        echo "$device" >/sys/bus/pci/drivers_probe
        [ -e "$folder/driver" ] || { echo "vfio-pci does not take $device"; return 1; }
    done
}

# kernel ADDRESS...: the kernel's own drivers get them back.
kernel() {
    for device in "$@"; do
        folder=/sys/bus/pci/devices/$device
        [ -e "$folder" ] || continue
        [ -e "$folder/driver" ] && echo "$device" >"$folder/driver/unbind"
        echo >"$folder/driver_override"
        echo "$device" >/sys/bus/pci/drivers_probe
    done
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
    left=$(($1 * 10))
    shift
    until "$@"; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "in vain: $*"; return 1; }
        sleep 0.1
    done
}
