//! The command line of the built program: exit codes, streams and help.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::process::{Command, Output};

/// The program with nothing of this test's environment that is its own.
fn pinrange(args: &[&str], env: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pinrange"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PINRANGE_") {
            command.env_remove(name);
        }
    }
    command
        .args(args)
        .envs(env.iter().copied())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).unwrap()
}

fn stderr(output: &Output) -> &str {
    std::str::from_utf8(&output.stderr).unwrap()
}

/// A directory with `pinrange.toml` in it, and the path of that.
fn file(toml: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pinrange.toml");
    std::fs::write(&path, toml).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (dir, path)
}

const GOOD: &str = "[cache]\ndir = \"CACHE\"\n[[mount]]\npath = \"/a\"\nbucket = \"bucket\"\n";

#[test]
fn check_prints_a_file_that_checks_the_same_and_touches_nothing() {
    let (dir, path) = file(GOOD);
    let cache = dir.path().join("cache");
    std::fs::write(&path, GOOD.replace("CACHE", cache.to_str().unwrap())).unwrap();
    let env = [
        ("PINRANGE_CACHE__FAN_OUT", "5"),
        ("AWS_SECRET_ACCESS_KEY", "hunter2"),
    ];
    let first = pinrange(&["check", "--config", &path], &env);
    assert_eq!((first.status.code(), stderr(&first)), (Some(0), ""));
    assert!(
        stdout(&first).contains("fan_out = 5\n"),
        "{}",
        stdout(&first)
    );
    assert!(
        stdout(&first).contains("part_size = \"8MiB\"\n"),
        "{}",
        stdout(&first)
    );
    assert!(!stdout(&first).contains("hunter2"));
    assert!(!cache.exists());

    let (_dir, again) = file(stdout(&first));
    let second = pinrange(&["check"], &[("PINRANGE_CONFIG", &again)]);
    assert_eq!(second.status.code(), Some(0));
    let body = |output: &Output| stdout(output).split_once('\n').unwrap().1.to_owned();
    assert_eq!(body(&first), body(&second));
}

#[test]
fn check_exits_2_with_the_line_that_is_wrong() {
    let (_dir, path) = file("[cache]\ncapacity = \"5x\"\n");
    let output = pinrange(&["check", "--config", &path], &[]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(2), ""));
    let mut lines = stderr(&output).lines();
    assert!(
        lines
            .next()
            .unwrap()
            .starts_with(&format!("{path}:2:12: cache.capacity: \"5x\""))
    );
    assert!(
        lines
            .next()
            .unwrap()
            .starts_with(&format!("{path}: there is no mount;"))
    );
    assert_eq!(lines.next(), None);
}

#[test]
fn check_refuses_the_log_filter_that_serve_refuses() {
    let (_dir, path) = file(GOOD);
    let args = ["check", "--config", &path];
    let output = pinrange(&args, &[("PINRANGE_LOG", "a=b=c")]);
    assert_eq!((output.status.code(), stdout(&output)), (Some(2), ""));
    let problem = stderr(&output);
    assert!(
        problem.starts_with("PINRANGE_LOG: \"a=b=c\" is not a log filter"),
        "{problem}"
    );
    for filter in ["", "warn"] {
        let output = pinrange(&args, &[("PINRANGE_LOG", filter)]);
        assert_eq!(output.status.code(), Some(0), "{filter:?}");
    }
}

#[test]
fn check_speaks_json() {
    let (_dir, path) = file(GOOD);
    let output = pinrange(&["check", "--json", "--config", &path], &[]);
    assert_eq!(output.status.code(), Some(0));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["valid"], true);
    assert_eq!(json["config"]["mount"][0]["bucket"], "bucket");
    assert_eq!(json["config"]["server"]["idle_timeout"], "1m15s");

    let (_dir, path) =
        file("[server]\nlisten = 1\n[[mount]]\npath = \"/a\"\nbucket = \"bucket\"\n");
    let env = [("PINRANGE_CACHE__FAN_OUT", "x")];
    let output = pinrange(&["check", "--json", "--config", &path], &env);
    assert_eq!((output.status.code(), stderr(&output)), (Some(2), ""));
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        json,
        serde_json::json!({ "valid": false, "problems": [
            {
                "file": path, "line": 2, "column": 10,
                "message": "server.listen: write it in quotes: \"1\"",
            },
            {
                "variable": "PINRANGE_CACHE__FAN_OUT",
                "message": "x is not a whole number from 1 to 64",
            },
        ]})
    );
}

#[test]
fn exit_codes_tell_usage_from_configuration() {
    for (args, env, code) in [
        (&["--help"][..], &[][..], 0),
        (&["--version"], &[], 0),
        (&["serve", "--help"], &[], 0),
        (&["check", "--help"], &[], 0),
        (&[], &[], 64),
        (&["sevre"], &[], 64),
        (&["serve", "--no-such-flag"], &[], 64),
        (&["serve", "--endpoint", "http://127.0.0.1:1"], &[], 64),
        (&["serve", "--dev", ".", "--bucket", "bucket"], &[], 64),
        (&["serve"], &[], 78),
        (&["serve", "--config", "/nonexistent.toml"], &[], 78),
        (
            &["serve", "--bucket", "bucket", "--capacity", "5x"],
            &[],
            78,
        ),
        (
            &["serve", "--bucket", "bucket"],
            &[("PINRANGE_SERVER__LISTEN", "x")],
            78,
        ),
        (
            &["serve", "--bucket", "bucket"],
            &[("PINRANGE_LOG", "a=b=c")],
            78,
        ),
    ] {
        let output = pinrange(args, env);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            stderr(&output)
        );
        assert_eq!(stdout(&output).is_empty(), code != 0, "{args:?}");
    }
}

#[test]
fn serve_names_the_flag_and_the_variable() {
    let args = [
        "serve",
        "--bucket",
        "B",
        "--path-style",
        "--capacity=5x",
        "--log-format=xml",
    ];
    let output = pinrange(&args, &[("PINRANGE_LOG", "a=b=c")]);
    let flags: Vec<_> = stderr(&output)
        .lines()
        .map(|l| l.split(':').next().unwrap())
        .collect();
    assert_eq!(
        flags,
        ["PINRANGE_LOG", "--log-format", "--capacity", "--bucket"]
    );
    assert!(stderr(&output).starts_with("PINRANGE_LOG: \"a=b=c\" is not a log filter ("));
}

/// Defaults are texts in the help, because a flag that was not given must leave the file its say.
#[test]
fn help_shows_the_defaults_there_are() {
    let checked = pinrange(
        &["check"],
        &[
            ("PINRANGE_MOUNT__0__PATH", "/"),
            ("PINRANGE_MOUNT__0__BUCKET", "bucket"),
        ],
    );
    let config: toml::Table = stdout(&checked).parse().unwrap();
    let help = pinrange(&["serve", "--help"], &[("COLUMNS", "100")]);
    let help = stdout(&help)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    for (flag, section, key) in [
        ("--listen", "server", "listen"),
        ("--admin", "server", "admin"),
        ("--log-format", "server", "log_format"),
        ("--cache-dir", "cache", "dir"),
        ("--capacity", "cache", "capacity"),
    ] {
        let of_flag = help.split(&format!("{flag} <")).nth(1).unwrap();
        let shown = of_flag
            .split("[default: ")
            .nth(1)
            .unwrap()
            .split(']')
            .next()
            .unwrap();
        assert_eq!(shown, config[section][key].as_str().unwrap(), "{flag}");
    }
}
