//! The plan as the guest's shell reads it.

use crate::plan::{Action, Step};

/// A word that the shell takes as it is.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

fn words<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    words.into_iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// Where the script of step `number` is in the guest.
fn script_path(number: usize) -> String {
    format!("/steps/{number}.sh")
}

/// The files with the scripts' text, with their paths in the guest.
pub fn scripts(steps: &[Step]) -> Vec<(String, String)> {
    let text = |step: &Step| match &step.action {
        Action::Script(lines, _) => Some(format!(". /etc/profile\nset -e\n{lines}")),
        Action::Run(..) => None,
    };
    steps.iter().enumerate().filter_map(|(number, step)| Some((script_path(number), text(step)?))).collect()
}

/// What init runs: the functions are in `guest/profile.sh` and `guest/init.sh`.
pub fn plan(steps: &[Step]) -> String {
    steps.iter().enumerate().map(|(number, step)| one(number, step)).collect()
}

fn one(number: usize, step: &Step) -> String {
    let mut lines = vec![format!("begin {}", quote(&step.name))];
    let devices = words(step.devices.iter().copied());
    let mut run = command(number, step);
    if !step.before.is_empty() {
        run = format!("prepare {} && {run}", quote(step.before));
    }
    if !devices.is_empty() {
        run = format!("give {devices} && {run}");
    }
    lines.push(run);
    if !step.after.is_empty() {
        lines.push(format!("prepare {}", quote(step.after)));
    }
    if !devices.is_empty() {
        lines.push(format!("take_back {devices}"));
    }
    lines.push("end".into());
    lines.join("\n") + "\n"
}

fn command(number: usize, step: &Step) -> String {
    let mut env = vec!["VFIO_URING_GUEST=1".to_string(), "RUST_BACKTRACE=1".into()];
    if let Some(first) = step.devices.first() {
        env.push(format!("VFIO_URING_DEVICE={first}"));
        env.push(format!("VFIO_URING_DEVICES={}", step.devices.join(",")));
    }
    if let Some(transport) = step.transport {
        env.push(format!("VFIO_URING_TRANSPORT={}", transport.name()));
    }
    env.extend(step.env.iter().map(|(name, value)| format!("{name}={value}")));
    let path = script_path(number);
    let program = match &step.action {
        Action::Run(binary, arguments) => words([binary.path().as_str()].into_iter().chain(arguments.iter().copied())),
        Action::Script(..) => words(["/bin/sh", path.as_str()]),
    };
    format!("run {} env {} {program}", step.timeout.as_secs(), words(env.iter().map(String::as_str)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{COMMAND, Transport};

    #[test]
    fn words_are_quoted() {
        assert_eq!(
            words(["--a=b", "0000:01:00.0", "", "two words", "it's $X"]),
            r"--a=b 0000:01:00.0 '' 'two words' 'it'\''s $X'"
        );
    }

    #[test]
    fn a_step_becomes_a_few_lines() {
        let mut step =
            Step::program("io", COMMAND, &["bench", "two words"]).within(9).devices(&["d1", "d2"]).env("X", "1 2");
        step.transport = Some(Transport::Cdev);
        let run = "run 9 env VFIO_URING_GUEST=1 RUST_BACKTRACE=1 VFIO_URING_DEVICE=d1 VFIO_URING_DEVICES=d1,d2 \
                   VFIO_URING_TRANSPORT=cdev 'X=1 2' /bin/vfio-uring bench 'two words'";
        assert_eq!(plan(&[step.clone()]), format!("begin io\ngive d1 d2 && {run}\ntake_back d1 d2\nend\n"));
        let step = step.before("echo 1 >/x").after("echo 2 >/x");
        let lines = plan(&[step]);
        assert!(lines.contains("give d1 d2 && prepare 'echo 1 >/x' && run 9 env "), "{lines}");
        assert!(lines.ends_with("\nprepare 'echo 2 >/x'\ntake_back d1 d2\nend\n"), "{lines}");
    }

    #[test]
    fn scripts_are_numbered_as_their_steps() {
        let steps = [Step::program("a", COMMAND, &[]), Step::script("b", "echo hello\n", &[COMMAND])];
        assert!(plan(&steps).contains("/bin/sh /steps/1.sh"));
        assert_eq!(scripts(&steps), [("/steps/1.sh".to_string(), ". /etc/profile\nset -e\necho hello\n".to_string())]);
    }
}
