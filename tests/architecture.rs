//! The layers, held against the code: a `use` that points up, a status code outside
//! `server/respond.rs` or the AWS SDK outside `remote/s3.rs` fails here. And the promises, against the files and tests that
//! are to keep them.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Lower layers first. A module may use its own layer's row only where `MAY_USE` says so.
const LAYERS: &[&[&str]] = &[
    &["semantics", "chance", "causes", "seldom"],
    &["object"],
    // Beside each other, and blind to each other.
    &["disk", "remote"],
    &["payload", "telemetry", "mount", "strict_s3"],
    &["origin"],
    &["fill"],
    &["tiers", "audit"],
    &["config"],
    &["server", "cli"],
];

/// Edges within a row, or up, that are meant.
const MAY_USE: &[(&str, &str)] = &[
    // `demo` and `serve --dev` run replicas.
    ("cli", "server"),
];

/// The texts below a directory of the package, by their paths in it.
fn texts(directory: &str) -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut found = BTreeMap::new();
    let mut todo = vec![root.clone()];
    while let Some(directory) = todo.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                found.insert(path.strip_prefix(&root).unwrap().to_owned(), text);
            }
        }
    }
    found
}

fn sources() -> BTreeMap<PathBuf, String> {
    let code = |(path, text): (_, String)| (path, code_of(&text));
    texts("src").into_iter().map(code).collect()
}

/// Without comments and without the tests at the end of the file.
fn code_of(text: &str) -> String {
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    text.lines()
        .map(|line| {
            if line.trim_start().starts_with("//") {
                ""
            } else {
                line
            }
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn module_of(path: &Path) -> String {
    let first = path.iter().next().unwrap().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

fn layer(module: &str) -> Option<usize> {
    LAYERS.iter().position(|row| row.contains(&module))
}

/// The modules named by `crate::…` anywhere in the code, `use crate::{a, b::c}` included.
fn used(code: &str) -> Vec<String> {
    let mut modules = Vec::new();
    for rest in code.split("crate::").skip(1) {
        if let Some(list) = rest.strip_prefix('{') {
            let mut depth = 0;
            let mut item = String::new();
            for symbol in list.chars() {
                match symbol {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => {
                        modules.push(std::mem::take(&mut item));
                        continue;
                    }
                    _ => {}
                }
                item.push(symbol);
            }
            modules.push(item);
        } else {
            modules.push(rest.to_owned());
        }
    }
    modules
        .into_iter()
        .map(|path| {
            path.trim_start()
                .chars()
                .take_while(|symbol| symbol.is_alphanumeric() || *symbol == '_')
                .collect()
        })
        .filter(|module: &String| layer(module).is_some())
        .collect()
}

#[test]
fn imports_point_one_way() {
    let mut wrong = Vec::new();
    let mut edges = 0;
    for (path, code) in sources() {
        let module = module_of(&path);
        let Some(here) = layer(&module) else {
            assert!(
                ["lib", "main"].contains(&module.as_str()),
                "src/{} belongs to no layer: give it one",
                path.display()
            );
            continue;
        };
        for target in used(&code) {
            if target == module {
                continue;
            }
            edges += 1;
            let there = layer(&target).unwrap();
            let meant = MAY_USE.contains(&(module.as_str(), target.as_str()));
            if there >= here && !meant {
                wrong.push(format!(
                    "src/{} uses {target}, which is not below it",
                    path.display()
                ));
            }
        }
    }
    assert!(edges > 20, "the reader of imports found only {edges}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Clients and servers of other protocols have statuses of their own.
const SPEAKS_HTTP_TOO: &[&str] = &["strict_s3", "remote/s3.rs", "cli/get"];

#[test]
fn only_respond_names_a_status_code() {
    let naming: Vec<_> = sources()
        .into_iter()
        .filter(|(path, code)| {
            !SPEAKS_HTTP_TOO.iter().any(|other| path.starts_with(other))
                && code.contains("StatusCode")
        })
        .map(|(path, _)| path)
        .collect();
    assert_eq!(naming, [PathBuf::from("server/respond.rs")]);
}

#[test]
fn only_tests_make_an_extent_of_any_file() {
    let naming: Vec<_> = sources()
        .into_iter()
        .filter(|(_, code)| code.contains("from_file("))
        .map(|(path, _)| path)
        .collect();
    assert_eq!(
        naming,
        [PathBuf::from("disk/extent.rs")],
        "a hole could be sent"
    );
}

#[test]
fn only_the_s3_driver_names_the_sdk() {
    let naming: Vec<_> = sources()
        .into_iter()
        .filter(|(_, code)| code.contains("aws_"))
        .map(|(path, _)| path)
        .collect();
    assert_eq!(naming, [PathBuf::from("remote/s3.rs")]);
}

#[test]
fn main_stays_a_table_of_contents() {
    let main =
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("src/main.rs")).unwrap();
    assert!(
        main.lines().count() <= 60,
        "main.rs has {} lines",
        main.lines().count()
    );
}

/// A promise is kept by files and tests that are there. (Tests are told by their long names.)
#[test]
fn the_promises_name_what_there_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let code: String = ["src", "tests"]
        .into_iter()
        .flat_map(texts)
        .map(|(_, text)| text)
        .collect();
    let promises = fs::read_to_string(root.join("docs/PROMISES.md")).unwrap();
    let (mut named, mut wrong) = (0, Vec::new());
    for word in promises.split('`').skip(1).step_by(2) {
        let name = word.rsplit("::").next().unwrap();
        let is_test = name.matches('_').count() > 2
            && name
                .bytes()
                .all(|byte| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit());
        let is_file = Path::new(word).extension().is_some_and(|of| of == "rs");
        let is_there = if is_file {
            let places = ["", "src", "src/server"];
            places.iter().any(|at| root.join(at).join(word).is_file())
        } else if is_test {
            ["(", "<"]
                .iter()
                .any(|end| code.contains(&format!("fn {name}{end}")))
        } else {
            continue;
        };
        named += 1;
        if !is_there {
            wrong.push(word);
        }
    }
    assert!(
        named > 100,
        "the reader of docs/PROMISES.md found only {named}"
    );
    assert!(
        wrong.is_empty(),
        "docs/PROMISES.md names what is not there: {wrong:?}"
    );
}
