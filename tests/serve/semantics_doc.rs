//! Executes the examples of `docs/SEMANTICS.md`.

use std::time::Duration;

use bytes::Bytes;
use http::Method;
use pinrange::strict_s3::PutOptions;

use crate::world::{Setup, World};

const DOCUMENT: &str = include_str!("../../docs/SEMANTICS.md");
const SMALL: &str = "abcdefghijklmnopqrstuvwxyz";

fn put(world: &World, key: &str, text: &str) -> String {
    let options = PutOptions {
        content_type: Some("text/plain".to_owned()),
        ..PutOptions::default()
    };
    world
        .s3
        .put(
            "bucket",
            key,
            Bytes::copy_from_slice(text.as_bytes()),
            options,
        )
        .unwrap()
        .etag
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_of_the_document_are_true() {
    let world = World::with(Setup {
        retries: 0,
        // However slow the machine, no label ages between two examples.
        fresh_for: Duration::from_mins(10),
        ..Setup::default()
    })
    .await;
    let etag = put(&world, "alphabet", SMALL);
    put(&world, "empty", "");
    let mut blocks = 0;
    for block in DOCUMENT.split("```http\n").skip(1) {
        let block = block.split("```").next().unwrap();
        run(&world, &etag, block).await;
        blocks += 1;
    }
    assert!(blocks >= 25, "found only {blocks} examples");
}

async fn run(world: &World, etag: &str, block: &str) {
    let fill = |text: &str| {
        text.replace("{etag}", etag)
            .replace("{other}", "\"nobody-has-this\"")
    };
    let mut sent: Option<(Method, String)> = None;
    let mut headers: Vec<(String, String)> = Vec::new();
    let mut answer = None;
    world.s3.clear_log();
    for line in block.lines() {
        if let Some(step) = line.strip_prefix("! ") {
            match step.split(' ').collect::<Vec<_>>()[..] {
                ["purge"] => assert_eq!(world.purge("/m/*").await, 200),
                ["replace"] => drop(put(world, "alphabet", &SMALL.to_uppercase())),
                ["restore"] => drop(put(world, "alphabet", SMALL)),
                ["outage"] => world.s3.stop_accepting().await,
                ["back"] => world.s3.resume().await.unwrap(),
                ["requests", n] => assert_eq!(world.s3.stats().requests.to_string(), n, "{block}"),
                _ => panic!("what is {line:?}?"),
            }
        } else if let Some(line) = line.strip_prefix("> ") {
            if let Some((name, value)) = line.split_once(": ") {
                headers.push((name.to_owned(), fill(value)));
            } else {
                let (method, path) = line.split_once(' ').unwrap();
                sent = Some((method.parse().unwrap(), path.to_owned()));
            }
        } else if let Some(line) = line.strip_prefix("< ") {
            if answer.is_none() {
                let (method, path) = sent.clone().unwrap();
                let headers: Vec<_> = headers
                    .iter()
                    .map(|(name, value)| (name.as_str(), value.as_str()))
                    .collect();
                answer = Some(world.ask(method, &path, &headers).await);
            }
            let answer = answer.as_ref().unwrap();
            match line.split_once(": ") {
                Some((name, value)) => {
                    let name = name.to_ascii_lowercase();
                    assert_eq!(answer.header(&name), fill(value), "{name} of\n{block}");
                }
                None => assert_eq!(answer.status.to_string(), line, "{block}"),
            }
        } else if let Some(body) = line.strip_prefix("body:") {
            let answer = answer.as_ref().unwrap();
            assert_eq!(
                String::from_utf8_lossy(&answer.body),
                body.trim_start(),
                "{block}"
            );
            assert!(!answer.cut, "{block}");
        } else {
            panic!("what is {line:?}?");
        }
    }
    assert!(answer.is_some(), "a block without a request:\n{block}");
}
