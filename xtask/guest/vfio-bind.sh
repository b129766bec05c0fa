# Each device that vfio-pci has is there for the transport.
for device in $(echo "$VFIO_URING_DEVICES" | tr , ' '); do
    folder=/sys/bus/pci/devices/$device
    case $VFIO_URING_TRANSPORT in
        group) node=/dev/vfio/$(basename "$(readlink -f "$folder/iommu_group")") ;;
        cdev) node=/dev/vfio/devices/$(ls "$folder/vfio-dev") ;;
    esac
    echo "$device is $node"
    [ -c "$node" ]
done
