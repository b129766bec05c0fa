//! The example of the fault queue works, in both forms.

use vfio_uring_models::faults::Form;

#[path = "../examples/fault_queue.rs"]
#[expect(dead_code, reason = "its main function")]
mod fault_queue;

#[test]
fn the_example_works() {
    for form in [Form::TwoRegion, Form::Single] {
        fault_queue::run(form).unwrap();
    }
}
