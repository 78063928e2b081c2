//! The configuration from the outside: layers, messages with their places, the example file.

#![expect(
    clippy::unwrap_used,
    reason = "a test that cannot be set up has failed"
)]

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use pinrange::config::{Config, Flags, ForbiddenAs};
use pinrange::disk::MinFree;
use pinrange::telemetry::LogFormat;

const MINIMAL: &str = "[[mount]]\npath = \"/a\"\nbucket = \"bucket\"\n";

/// Loads `toml` as the file `pinrange.toml` of a fresh directory. In the message the directory is cut off.
fn load(toml: &str, env: &[(&str, &str)], flags: &Flags) -> Result<Config, String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pinrange.toml");
    std::fs::write(&path, toml).unwrap();
    Config::load(Some(&path), variables(env), flags).map_err(|error| {
        error
            .to_string()
            .replace(&format!("{}/", dir.path().display()), "")
    })
}

fn variables(env: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    env.iter()
        .map(|(name, value)| (name.into(), value.into()))
        .collect()
}

fn file(toml: &str) -> Result<Config, String> {
    load(toml, &[], &Flags::default())
}

/// With `MINIMAL`, whose three lines come first.
fn message(toml: &str) -> String {
    file(&format!("{MINIMAL}{toml}")).expect_err(toml)
}

fn env_message(env: &[(&str, &str)]) -> String {
    load(MINIMAL, env, &Flags::default()).expect_err("refused")
}

fn assert_messages(cases: &[(&str, &str)]) {
    for (toml, expected) in cases {
        assert_eq!(message(toml), *expected);
    }
}

#[test]
fn unknown_keys_are_named_with_line_and_column() {
    assert_messages(&[
        (
            "[server]\nlissten = \"127.0.0.1:1\"\n",
            "pinrange.toml:5:1: unknown key `lissten`, expected one of `listen`, `admin`, \
             `drain_timeout`, `drain_grace`, `log_format`, `worker_threads`, `max_connections`, `header_timeout`, \
             `header_max_bytes`, `idle_timeout`, `progress_timeout`, `min_rate`; correct its name or remove it",
        ),
        (
            "[sever]\n",
            "pinrange.toml:4:2: unknown key `sever`, expected one of `server`, `cache`, `mount`; \
             correct its name or remove it",
        ),
        (
            "secret_access_key = \"hush\"\n",
            "pinrange.toml:4:1: unknown key `secret_access_key`, expected one of `path`, `bucket`, \
             `prefix`, `endpoint`, `region`, `path_style`, `fresh_for`, `stale_if_error`, \
             `forbidden`, `connect_timeout`, `first_byte_timeout`, `stall_timeout`, `retries`, `verify`; \
             credentials come from the standard AWS chain only (environment, profile, instance \
             role), never from this file",
        ),
    ]);
}

#[test]
fn values_of_the_wrong_type_are_refused_in_their_place() {
    assert_messages(&[
        (
            "[cache]\ncapacity = [1]\n",
            "pinrange.toml:5:12: invalid type: sequence, expected a string, a number, true or false",
        ),
        (
            "[cache]\nfan_out = \"8\"\n",
            "pinrange.toml:5:11: cache.fan_out: \"8\" (in quotes) is not a whole number from 1 to 64",
        ),
        (
            "[cache]\nfan_out = 0\n",
            "pinrange.toml:5:11: cache.fan_out: 0 is not a whole number from 1 to 64",
        ),
        (
            "retries = -1\n",
            "pinrange.toml:4:11: mount.retries: -1 is not a whole number from 0 to 10",
        ),
        (
            "path_style = 1\n",
            "pinrange.toml:4:14: mount.path_style: it is neither true nor false; write one of them, \
             without quotes",
        ),
        (
            "[server]\nworker_threads = \"many\"\n",
            "pinrange.toml:5:18: server.worker_threads: \"many\" (in quotes) is not a whole number from \
             1 to 1024, nor \"auto\" for one per core",
        ),
        (
            "forbidden = 404\n",
            "pinrange.toml:4:13: mount.forbidden: write it in quotes: \"404\"",
        ),
        (
            "forbidden = \"403\"\n",
            "pinrange.toml:4:13: mount.forbidden: \"403\" is no answer to a 403 of S3; write \"502\", \
             or \"404\" if the credentials may not list the bucket",
        ),
        (
            "[server]\nlog_format = \"xml\"\n",
            "pinrange.toml:5:14: server.log_format: \"xml\" is no log format; write text or json",
        ),
    ]);
}

#[test]
fn sizes_and_durations_without_sense_are_refused_in_their_place() {
    assert_messages(&[
        (
            "[cache]\n  capacity   =   \"5x\"\n",
            "pinrange.toml:5:18: cache.capacity: \"5x\" is not a size: no unit \"x\"; use B, KiB, MiB, \
             GiB or TiB (powers of 1024), or KB, MB, GB or TB (powers of 1000)",
        ),
        (
            "[cache]\ndir = \"/var/\\u0000x\"\n",
            "pinrange.toml:5:7: cache.dir: \"/var/\\0x\" has a NUL, which no path has; remove it",
        ),
        (
            "fresh_for = 2\n",
            "pinrange.toml:4:13: mount.fresh_for: \"2\" has no unit; write 2s for seconds or 2ms",
        ),
        (
            "stall_timeout = \"0s\"\n",
            "pinrange.toml:4:17: mount.stall_timeout: a timeout of 0 would end everything at once; \
             write at least 1ms",
        ),
        (
            "[cache]\nmin_free = \"120%\"\n",
            "pinrange.toml:5:12: cache.min_free: 120% of the disk left free leaves no room for a \
             cache; write less than 100%, such as 5%",
        ),
        (
            "[server]\nheader_max_bytes = \"1KiB\"\n",
            "pinrange.toml:5:20: server.header_max_bytes: 1KiB is out of bounds; write 8KiB to 1MiB",
        ),
    ]);
}

#[test]
fn sizes_that_do_not_fit_each_other_are_refused_in_their_place() {
    assert_messages(&[
        (
            "[cache]\nblock_size = \"300KiB\"\n",
            "pinrange.toml:5:14: cache.block_size: 300KiB is not a power of two; write 256KiB or 512KiB",
        ),
        (
            "[cache]\npart_size = \"1000KiB\"\n",
            "pinrange.toml:5:13: cache.part_size: part_size (1000KiB) is not a multiple of block_size \
             (256KiB)",
        ),
        (
            "[cache]\ncapacity = \"10MiB\"\n",
            "pinrange.toml:5:12: cache.capacity: capacity (10MiB) does not hold 4 parts of 8MiB; raise \
             capacity to 32MiB or lower part_size",
        ),
        (
            "[cache]\npart_size = \"512MiB\"\n",
            "pinrange.toml:5:13: cache.part_size: fill_budget (256MiB) does not hold one part of \
             512MiB, so no fill could start; raise fill_budget or lower part_size",
        ),
    ]);
}

#[test]
fn addresses_that_cannot_be_bound_are_refused_in_their_place() {
    assert_messages(&[
        (
            "[server]\nlisten = \":80\"\n",
            "pinrange.toml:5:10: server.listen: \":80\" has no address; write 127.0.0.1:80, or \
             0.0.0.0:80 for every interface",
        ),
        (
            "[server]\nlisten = \"localhost:80\"\n",
            "pinrange.toml:5:10: server.listen: \"localhost\" is not an IP address, and host names are \
             not looked up; write one, such as 127.0.0.1:80",
        ),
        (
            "[server]\nlisten = \"::1:80\"\n",
            "pinrange.toml:5:10: server.listen: write an IPv6 address in brackets: [::1]:80",
        ),
        (
            "[server]\nlisten = \"127.0.0.1\"\n",
            "pinrange.toml:5:10: server.listen: \"127.0.0.1\" has no port; write an address and a port, \
             such as 127.0.0.1:8080",
        ),
        (
            "[server]\nlisten = \"0.0.0.0:8081\"\n",
            "pinrange.toml:5:10: server.listen: listen (0.0.0.0:8081) and admin (127.0.0.1:8081) \
             cannot share a port; give them two",
        ),
    ]);
}

#[test]
fn mounts_that_cannot_work_are_refused_in_their_place() {
    assert_eq!(
        file("[mount]\npath = \"/a\"\n").expect_err("no list"),
        "pinrange.toml:1:1: mounts are a list; write [[mount]] instead of [mount]"
    );
    assert_messages(&[
        (
            "[[mount]]\npath = \"/a\"\nbucket = \"other\"\n",
            "pinrange.toml:5:8: mount.path: \"/a\" is mounted already (pinrange.toml:2:8); give each \
             mount a path of its own",
        ),
        (
            "[[mount]]\npath = \"/b\"\n",
            "pinrange.toml:4:1: this mount has no bucket; add bucket = \"my-bucket\"",
        ),
        (
            "endpoint = \"ftp://host\"\n",
            "pinrange.toml:4:12: mount.endpoint: it is not an http:// or https:// URL; write it like \
             http://127.0.0.1:3900",
        ),
        (
            "prefix = \"/x\"\n",
            "pinrange.toml:4:10: mount.prefix: \"/x\" starts with a slash, which S3 would take as part \
             of every key; write \"x\"",
        ),
        (
            "region = \"\"\n",
            "pinrange.toml:4:10: mount.region: \"\" is not a region; write it like eu-central-1",
        ),
    ]);
}

#[test]
fn columns_count_characters() {
    assert_messages(&[(
        "prefix = \"ä\" oops\n",
        "pinrange.toml:4:14: unexpected key or value, expected newline, `#`",
    )]);
}

#[test]
fn mount_paths_are_whole_plain_segments() {
    let refused = |path: &str| {
        file(&format!(
            "[[mount]]\npath = {path:?}\nbucket = \"bucket\"\n"
        ))
        .expect_err(path)
    };
    for (path, expected) in [
        ("", "\"\" does not start with a slash; write \"/\""),
        ("a/b", "\"a/b\" does not start with a slash; write \"/a/b\""),
        ("/a/", "\"/a/\" ends with a slash; write \"/a\""),
        ("//", "\"//\" ends with a slash; write \"/\""),
        (
            "/a//b",
            "\"/a//b\" has the segment \"\", which no client can ask for; remove it",
        ),
        (
            "/a/../b",
            "\"/a/../b\" has the segment \"..\", which no client can ask for; remove it",
        ),
        (
            "/.",
            "\"/.\" has the segment \".\", which no client can ask for; remove it",
        ),
        (
            "/a%20b",
            "\"/a%20b\" contains '%'; use letters, digits and -._~!$&'()*+,;=:@",
        ),
        (
            "/a b",
            "\"/a b\" contains ' '; use letters, digits and -._~!$&'()*+,;=:@",
        ),
        (
            "/a?b",
            "\"/a?b\" contains '?'; use letters, digits and -._~!$&'()*+,;=:@",
        ),
    ] {
        assert_eq!(
            refused(path),
            format!("pinrange.toml:2:8: mount.path: {expected}")
        );
    }
    for path in ["/", "/a", "/a/b.c", "/models:v1/@x", "/..."] {
        let toml = format!("[[mount]]\npath = {path:?}\nbucket = \"bucket\"\n");
        assert_eq!(file(&toml).unwrap().mounts[0].path, path);
    }
}

#[test]
fn bucket_names_follow_s3() {
    for (bucket, why) in [
        ("ab", "3 to 63 characters"),
        ("a".repeat(64).as_str(), "3 to 63 characters"),
        ("My-Bucket", "lower-case"),
        ("my_bucket", "lower-case"),
        ("-bucket", "start and end"),
        ("bucket.", "start and end"),
        ("a..b", "two dots"),
        ("192.168.0.1", "IP address"),
        ("s3://bucket", "prefix"),
        ("bucket/folder", "prefix"),
        ("arn:aws:s3:::bucket", "access points"),
    ] {
        let error =
            file(&format!("[[mount]]\npath = \"/a\"\nbucket = {bucket:?}\n")).expect_err(bucket);
        assert!(
            error.starts_with("pinrange.toml:3:10: mount.bucket: "),
            "{error}"
        );
        assert!(error.contains(why), "{error}");
    }
}

/// The SDK would ask other hosts for them, in sessions.
#[test]
fn directory_buckets_are_refused() {
    for name in [
        "models--euc1-az1--x-s3",
        "reader--euc1-az1--xa-s3",
        "arn:aws:s3express:eu-central-1:123456789012:accesspoint/reader--euc1-az1--xa-s3",
    ] {
        for endpoint in ["", "endpoint = \"http://127.0.0.1:3900\"\n"] {
            let toml = format!("[[mount]]\npath = \"/a\"\nbucket = {name:?}\n{endpoint}");
            assert_eq!(
                file(&toml).expect_err(name),
                format!(
                    "pinrange.toml:3:10: mount.bucket: mount \"/a\": {name:?} is a directory bucket (S3 Express One \
                     Zone), which pinrange cannot read; mount a general purpose bucket"
                )
            );
        }
    }
    let inside = "models--x-s3-copy";
    let toml = format!("[[mount]]\npath = \"/a\"\nbucket = {inside:?}\n");
    assert_eq!(file(&toml).unwrap().mounts[0].bucket, inside);
}

#[test]
fn an_access_point_may_stand_for_a_bucket() {
    let arn = "arn:aws:s3:eu-central-1:123456789012:accesspoint/models";
    let toml = format!("[[mount]]\npath = \"/a\"\nbucket = {arn:?}\n");
    assert_eq!(file(&toml).unwrap().mounts[0].bucket, arn);
}

#[test]
fn an_endpoint_with_a_password_is_refused_without_repeating_it() {
    let mut checked = 0;
    for endpoint in [
        "http://AKIA:hunter2@host:9000",
        "https://hunter2@host",
        "hunter2@host",
        "http://host/?key=hunter2",
        "http://host:hunter2",
        "http://ho st/hunter2",
    ] {
        let error = message(&format!("endpoint = {endpoint:?}\n"));
        assert!(
            error.starts_with("pinrange.toml:4:12: mount.endpoint: "),
            "{error}"
        );
        assert!(!error.contains("hunter2"), "{error}");
        checked += usize::from(error.contains("holds no credentials"));
    }
    assert_eq!(checked, 3);
}

#[test]
fn endpoints_are_taken_and_trimmed() {
    for (endpoint, expected) in [
        ("http://127.0.0.1:3900", "http://127.0.0.1:3900"),
        ("http://127.0.0.1:3900/", "http://127.0.0.1:3900"),
        (
            "https://s3.example.com/storage/v1",
            "https://s3.example.com/storage/v1",
        ),
        ("http://[::1]:9000", "http://[::1]:9000"),
    ] {
        let config = file(&format!("{MINIMAL}endpoint = {endpoint:?}\n")).unwrap();
        assert_eq!(config.mounts[0].endpoint.as_deref(), Some(expected));
        assert!(
            config.mounts[0].path_style,
            "an endpoint makes path style the default"
        );
    }
    for endpoint in [
        "http://",
        "http:///x",
        "http://:80",
        "http://host:",
        "http://host:99999",
    ] {
        message(&format!("endpoint = {endpoint:?}\n"));
    }
    assert!(
        !file(MINIMAL).unwrap().mounts[0].path_style,
        "AWS has the bucket in the host name"
    );
}

#[test]
fn every_problem_is_reported_at_once() {
    let error = load(
        "[server]\nlisten = \"x\"\n[cache]\ncapacity = \"y\"\n[[mount]]\npath = \"z\"\n",
        &[
            ("PINRANGE_CACHE__FAN_OUT", "many"),
            ("PINRANGE_CACHE__NOPE", "1"),
        ],
        &Flags {
            admin: Some("w".into()),
            ..Flags::default()
        },
    )
    .unwrap_err();
    let places: Vec<&str> = error
        .lines()
        .map(|l| l.split(": ").next().unwrap())
        .collect();
    assert_eq!(
        places,
        [
            "PINRANGE_CACHE__NOPE",
            "pinrange.toml:2:10",
            "--admin",
            "pinrange.toml:4:12",
            "PINRANGE_CACHE__FAN_OUT",
            "pinrange.toml:5:1",
            "pinrange.toml:6:8",
        ]
    );
}

/// What stands in the place of a value that was refused is nobody's doing.
#[test]
fn a_value_that_is_wrong_is_reported_once() {
    assert_messages(&[
        (
            "[cache]\nblock_size = \"300KiB\"\npart_size = \"900KiB\"\n",
            "pinrange.toml:5:14: cache.block_size: 300KiB is not a power of two; write 256KiB or 512KiB",
        ),
        (
            "[cache]\npart_size = \"2GiB\"\ncapacity = \"10MiB\"\nfill_budget = \"1MiB\"\n",
            "pinrange.toml:5:13: cache.part_size: 2GiB is out of bounds; write 4KiB to 1GiB",
        ),
        (
            "[server]\nadmin = \":80\"\nlisten = \"127.0.0.1:8081\"\n",
            "pinrange.toml:5:9: server.admin: \":80\" has no address; write 127.0.0.1:80, or 0.0.0.0:80 for \
             every interface",
        ),
        // Both are right by themselves.
        (
            "[cache]\npart_size = \"1000MiB\"\nblock_size = \"256KiB\"\ncapacity = \"3000MiB\"\n",
            "pinrange.toml:7:12: cache.capacity: capacity (3000MiB) does not hold 4 parts of 1000MiB; raise \
             capacity to 4000MiB or lower part_size\n\
             pinrange.toml:5:13: cache.part_size: fill_budget (256MiB) does not hold one part of 1000MiB, so no \
             fill could start; raise fill_budget or lower part_size",
        ),
    ]);
}

#[test]
fn a_configuration_without_a_mount_says_how_to_get_one() {
    let hint = "there is no mount; add a [[mount]] section with path and bucket, or give --bucket, or \
                try `pinrange serve --dev DIR` or `pinrange demo`";
    assert_eq!(file("").unwrap_err(), format!("pinrange.toml: {hint}"));
    let error = Config::load(None, [], &Flags::default()).unwrap_err();
    assert_eq!(error.to_string(), format!("configuration: {hint}"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let error = Config::load(
        Some(Path::new("/nonexistent/p.toml")),
        [],
        &Flags::default(),
    );
    assert_eq!(
        error.unwrap_err().to_string(),
        "/nonexistent/p.toml: cannot be read: No such file or directory (os error 2); --config or \
         PINRANGE_CONFIG names the file"
    );
}

#[test]
fn flag_goes_before_variable_before_file_before_default() {
    let toml = format!("{MINIMAL}[server]\nlisten = \"127.0.0.1:1\"\n");
    let env = [("PINRANGE_SERVER__LISTEN", "127.0.0.1:2")];
    let flags = Flags {
        listen: Some("127.0.0.1:3".into()),
        ..Flags::default()
    };
    let port = |config: Result<Config, String>| config.unwrap().server.listen.port();
    assert_eq!(port(load(MINIMAL, &[], &Flags::default())), 8080);
    assert_eq!(port(load(&toml, &[], &Flags::default())), 1);
    assert_eq!(port(load(&toml, &env, &Flags::default())), 2);
    assert_eq!(port(load(&toml, &env, &flags)), 3);
    // What is overridden is not judged.
    let toml = toml.replace("127.0.0.1:1", "nonsense");
    assert_eq!(port(load(&toml, &env, &Flags::default())), 2);
}

#[test]
fn variables_set_every_type_and_whole_mounts() {
    let config = load(
        MINIMAL,
        &[
            ("PINRANGE_SERVER__WORKER_THREADS", "3"),
            ("PINRANGE_SERVER__LOG_FORMAT", "json"),
            ("PINRANGE_CACHE__CAPACITY", "1073741824"),
            ("PINRANGE_CACHE__MIN_FREE", "1GiB"),
            ("PINRANGE_MOUNT__0__PATH_STYLE", "true"),
            ("PINRANGE_MOUNT__0__FORBIDDEN", "404"),
            ("PINRANGE_MOUNT__1__PATH", "/one"),
            ("PINRANGE_MOUNT__1__BUCKET", "bucket-one"),
            ("PINRANGE_MOUNT__1__FRESH_FOR", "0s"),
            // Ours by prefix only.
            ("PINRANGE_CONFIG", "/elsewhere.toml"),
            ("PINRANGE_LOG", "debug"),
            ("PINRANGE_GARAGE", "/usr/bin/garage"),
            ("PINRANGE_PORT_8080_TCP", "tcp://10.0.0.1:8080"),
            ("PINRANGE_SERVER_SERVICE_HOST", "10.0.0.1"),
            ("PATH", "/bin"),
        ],
        &Flags::default(),
    )
    .unwrap();
    assert_eq!(
        config
            .server
            .worker_threads
            .map(std::num::NonZeroUsize::get),
        Some(3)
    );
    assert_eq!(config.server.log_format, LogFormat::Json);
    assert_eq!(config.cache.capacity, 1 << 30);
    assert_eq!(config.cache.min_free, MinFree::Bytes(1 << 30));
    let [file, added] = &config.mounts[..] else {
        panic!("{:?}", config.mounts)
    };
    assert_eq!((file.path.as_str(), file.path_style), ("/a", true));
    assert_eq!(file.forbidden, ForbiddenAs::NotFound);
    assert_eq!(
        (added.path.as_str(), added.bucket.as_str()),
        ("/one", "bucket-one")
    );
    assert_eq!(added.fresh_for, Duration::ZERO);
}

#[test]
fn more_than_ten_mounts_come_in_the_order_of_their_numbers() {
    let names: Vec<_> = (0..12)
        .flat_map(|i| {
            [
                (format!("PINRANGE_MOUNT__{i}__PATH"), format!("/m{i}")),
                (format!("PINRANGE_MOUNT__{i}__BUCKET"), "bucket".to_owned()),
            ]
        })
        .rev()
        .collect();
    let env: Vec<_> = names
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    let config = load("", &env, &Flags::default()).unwrap();
    let paths: Vec<_> = config
        .mounts
        .iter()
        .map(|mount| mount.path.clone())
        .collect();
    assert_eq!(paths, (0..12).map(|i| format!("/m{i}")).collect::<Vec<_>>());
}

#[test]
fn variable_errors_name_the_variable() {
    for (name, value, expected) in [
        (
            "PINRANGE_CACHE__CAPACITY",
            "",
            "\"\" is not a size; write a number and a unit, such as 256KiB, 100GB or 1.5GiB",
        ),
        (
            "PINRANGE_CACHE__FAN_OUT",
            "x",
            "x is not a whole number from 1 to 64",
        ),
        (
            "PINRANGE_CACHE__SIZE",
            "1",
            "no key \"size\" in [cache]; there are dir, capacity, min_free, block_size, part_size, \
             fill_budget, fan_out, scrub_rate",
        ),
        (
            "PINRANGE_SERVR__LISTEN",
            "1",
            "no section \"servr\"; there are server, cache and mount",
        ),
        (
            "PINRANGE_SERVER_LISTEN",
            "1",
            "two underscores stand between section and key: PINRANGE_SERVER__LISTEN",
        ),
        ("PINRANGE_SERVER__0__LISTEN", "1", "[server] is not a list"),
        (
            "PINRANGE_SERVER__listen",
            "1",
            "write it in upper case: PINRANGE_SERVER__LISTEN",
        ),
        (
            "PINRANGE_MOUNT__PATH",
            "/",
            "a mount needs its index, counted from 0: PINRANGE_MOUNT__0__PATH",
        ),
        (
            "PINRANGE_MOUNT__5__PATH",
            "/",
            "there is no mount 5: with 1 so far the next one is 1",
        ),
        (
            "PINRANGE_MOUNT__X__PATH",
            "/",
            "\"x\" is not an index; mounts are counted from 0",
        ),
        (
            "PINRANGE_MOUNT__0__PATH__X",
            "/",
            "too many `__` in the name",
        ),
    ] {
        assert_eq!(env_message(&[(name, value)]), format!("{name}: {expected}"));
    }
    assert_eq!(
        env_message(&[("PINRANGE_MOUNT__1__PATH", "/b")]),
        "PINRANGE_MOUNT__1__BUCKET: this mount has no bucket; add bucket = \"my-bucket\""
    );
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_utf8_is_named() {
    use std::os::unix::ffi::OsStringExt;
    let env = [("PINRANGE_CACHE__DIR".into(), OsString::from_vec(vec![0xff]))];
    let flags = Flags {
        bucket: Some("bucket".into()),
        ..Flags::default()
    };
    assert_eq!(
        Config::load(None, env, &flags).unwrap_err().to_string(),
        "PINRANGE_CACHE__DIR: its value is not UTF-8; set it to plain text"
    );
}

#[test]
fn a_mount_of_flags_replaces_the_others() {
    let flags = Flags {
        bucket: Some("quick".into()),
        endpoint: Some("http://127.0.0.1:9000".into()),
        path_style: Some("false".into()),
        ..Flags::default()
    };
    let config = load(MINIMAL, &[("PINRANGE_MOUNT__1__PATH", "/b")], &flags).unwrap();
    let [mount] = &config.mounts[..] else {
        panic!("{:?}", config.mounts)
    };
    assert_eq!((mount.path.as_str(), mount.bucket.as_str()), ("/", "quick"));
    assert!(!mount.path_style);
    let flags = Flags {
        mount: Some("x".into()),
        ..flags
    };
    assert_eq!(
        load(MINIMAL, &[], &flags).unwrap_err(),
        "--mount: \"x\" does not start with a slash; write \"/x\""
    );
}

#[test]
fn dev_needs_no_mount_no_root_and_stays_on_loopback() {
    let flags = Flags {
        dev: Some("files".into()),
        ..Flags::default()
    };
    let config = Config::load(None, variables(&[("HOME", "/home/me")]), &flags).unwrap();
    assert_eq!(config.dev.as_deref(), Some(Path::new("files")));
    assert_eq!(config.mounts, []);
    assert_eq!(config.cache.dir, Path::new("/home/me/.cache/pinrange-dev"));
    let env = [("HOME", "/home/me"), ("XDG_CACHE_HOME", "/fast")];
    let config = Config::load(None, variables(&env), &flags).unwrap();
    assert_eq!(config.cache.dir, Path::new("/fast/pinrange-dev"));
    // The cache directory of a real replica is not the place for experiments.
    assert_eq!(
        file(MINIMAL).unwrap().cache.dir,
        Path::new("/var/lib/pinrange")
    );

    let flags = Flags {
        listen: Some("0.0.0.0:80".into()),
        ..flags
    };
    assert_eq!(
        Config::load(None, [], &flags).unwrap_err().to_string(),
        "--listen: --dev serves on loopback only, not on 0.0.0.0; write 127.0.0.1:80"
    );
}

#[test]
fn descriptors_limit_connections() {
    let server = file(MINIMAL).unwrap().server;
    assert_eq!(server.connections_within(u64::MAX), 10_000);
    assert_eq!(server.connections_within(1024), 384);
    assert_eq!(server.connections_within(256), 96);
    assert_eq!(server.connections_within(64), 24);
    assert_eq!(server.connections_within(0), 1);
}

/// `deploy/pinrange.example.toml` shows defaults as `#key = value`.
#[test]
fn the_example_file_tells_the_truth() {
    let example = include_str!("../deploy/pinrange.example.toml");
    let is_key = |line: &str| {
        line.strip_prefix('#')
            .and_then(|rest| rest.split_once(" = "))
            .is_some_and(|(key, _)| key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'))
    };
    let lines: Vec<_> = example
        .lines()
        .map(|line| if is_key(line) { &line[1..] } else { line })
        .collect();
    let uncommented = lines.join("\n");
    // These have no default, so the example's values are added to what is as shipped.
    let mut defaults = file(example).unwrap();
    defaults.mounts[0].endpoint = Some("http://127.0.0.1:3900".into());
    defaults.mounts[0].region = Some("us-east-1".into());
    defaults.mounts[0].path_style = true;
    let all = file(&uncommented).unwrap();
    assert_eq!(all, defaults);

    // And nothing is left out: with everything set, the file has the keys of the configuration.
    let keys = |toml: &str| -> Vec<String> {
        let table: toml::Table = toml.parse().unwrap();
        let mut keys: Vec<String> = table
            .iter()
            .flat_map(|(section, value)| {
                let table = value.as_array().map_or(value, |mounts| &mounts[0]);
                table
                    .as_table()
                    .unwrap()
                    .keys()
                    .map(move |key| format!("{section}.{key}"))
            })
            .collect();
        keys.sort();
        keys
    };
    assert_eq!(keys(&uncommented), keys(&toml::to_string(&all).unwrap()));
}

#[test]
fn what_is_printed_reads_back_as_the_same() {
    let toml = "[server]\nworker_threads = 2\nlisten = \"[::1]:0\"\n\
                [cache]\nmin_free = \"2.5%\"\ncapacity = 1000000001\n\
                [[mount]]\npath = \"/\"\nbucket = \"one\"\nforbidden = \"404\"\nfresh_for = \"1h30m\"\n\
                [[mount]]\npath = \"/x\"\nbucket = \"two\"\nendpoint = \"http://h\"\nregion = \"r\"\n";
    let config = file(toml).unwrap();
    assert_eq!(file(&toml::to_string(&config).unwrap()).unwrap(), config);
}
