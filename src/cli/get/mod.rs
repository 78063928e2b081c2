//! `pinrange get`: a parallel download that is exactly one revision of the object, or fails.
//!
//! The first response teaches the object's strong `ETag` and length ([`client`]); from then on every connection
//! asks for its stretch with `If-Match` and demands that tag, that range and that length back. Stretches
//! go straight to their place in the part file ([`part`]), which a state file makes resumable, and only a
//! complete and verified ([`verify`]) file gets its name. With `-o -` the stretches pass through a bounded
//! window in memory instead, in order ([`stream`]).
//!
//! ```text
//! open ──Pinned──▶ N × stretch ──▶ verify ──▶ fsync, rename
//!   │ ▲               │ 412, another tag: start over with the new revision (--max-restarts)
//!   │ └───────────────┘
//!   └───Whole────▶ one stream, unpinned, with a warning
//! ```
//!
//! A server that cannot pin gets the single stream; a server that lies is not believed. Dropping the future of
//! [`download`] at any await leaves a part file that the next run resumes; cancelling it by the token
//! also saves the last second's progress.

mod client;
mod error;
mod part;
mod progress;
mod stream;
mod url;
mod verify;

use std::fs;
use std::io::{self, BufReader, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderName, HeaderValue, Uri};
use parking_lot::Mutex;
use percent_encoding::{AsciiSet, percent_decode_str, percent_encode};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::client::{Client, Cut, Frames, Opening, Patience, Pin, Sink, Stop, Whole};
pub use self::error::GetError;
use self::part::{Part, PartSink, blocking};
use self::progress::Console;
use self::verify::Expected;
use crate::semantics::ByteRange;

/// How often the state is saved: a kill costs at most this much of the download, and the data that has to be on the disk
/// first is written back while the network works instead of at the end.
const SAVE_EVERY: Duration = Duration::from_secs(1);

/// How a netrc passes through its parser, which panics on anything but ASCII.
const PERCENT: &AsciiSet = &AsciiSet::EMPTY.add(b'%');

const EXIT_CODES: &str = "\
Exit codes:
    0  the file is complete, and verified where the server sent a checksum
   64  wrong usage
   65  the bytes do not have the checksum or the length that the server announced
   66  404 or 410: there is no such object
   69  the server could not be reached or did not deliver, after all retries
   73  the output cannot be created, or another download into it is under way
   74  writing the output, or the events of --json, failed
   75  the object was replaced more often than --max-restarts
   76  the server's answers contradict HTTP or each other
   77  401 or 403: access denied
  130  interrupted by Ctrl-C

Until it is complete, FILE is FILE.pinrange-part beside it, with FILE.pinrange-state. Run the same \
command again to resume. A complete FILE replaces what had the name. Bytes with a wrong checksum stay \
in FILE.pinrange-part for inspection, and the next run begins anew. The checksums are Repr-Digest \
(sha-256, sha-512) and S3's x-amz-checksum-sha256, -crc64nvme, -crc32c and -crc32 of the full object.";

/// Download a file in parallel ranges that are all pinned to one revision
///
/// Learns the object's size and strong ETag from the first response, fetches the rest over several connections with
/// If-Match, resumes what was interrupted, starts over if the object is replaced, and verifies length and
/// checksum. Works with any server that has strong ETags and byte ranges: pinrange, S3, nginx. From other servers
/// it downloads in one stream, with a warning.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXIT_CODES)]
pub struct GetArgs {
    /// What to download (http or https)
    url: String,

    /// Where to; `-` streams to standard output in order. Without it, the last part of the URL's path
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// How many connections to use
    #[arg(short, long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=256))]
    connections: u16,

    /// How much to ask for at once (K, M, G and KiB, MiB, GiB are powers of 1024). With `-o -`, up to N times this is
    /// held in memory
    #[arg(long, value_name = "SIZE", default_value = "16MiB", value_parser = parse_size)]
    chunk_size: u64,

    /// A header to send to the URL's own host, and not where it redirects to; can be repeated
    #[arg(short = 'H', long = "header", value_name = "NAME: VALUE", value_parser = parse_header)]
    headers: Vec<(HeaderName, HeaderValue)>,

    /// Take the host's login and password from ~/.netrc
    #[arg(long)]
    netrc: bool,

    /// Take the host's login and password from this file
    #[arg(long, value_name = "FILE")]
    netrc_file: Option<PathBuf>,

    /// How often in a row a chunk may fail without one byte of progress (connection errors, 408, 429, 500, 502,
    /// 503, 504). The pauses double from 0.25 s to 10 s, or are what Retry-After says, up to 5 minutes
    #[arg(long, value_name = "N", default_value_t = 10)]
    retries: u32,

    /// How often to start over because the object was replaced meanwhile
    #[arg(long, value_name = "N", default_value_t = 5)]
    max_restarts: u32,

    /// Report progress and result as one JSON object a line, on standard output (with `-o -`, on standard error)
    #[arg(long)]
    json: bool,
}

impl GetArgs {
    fn to_stdout(&self) -> bool {
        self.output.as_deref() == Some(Path::new("-"))
    }
}

/// What a download came to.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Summary {
    /// The file or device, or `None` where the bytes went to standard output.
    pub file: Option<PathBuf>,
    /// The object's length in bytes.
    pub bytes: u64,
    /// How many of them an earlier run had downloaded.
    pub resumed: u64,
    /// The revision, as the server's `ETag` field names it.
    pub etag: Option<String>,
    /// The checksum that was verified; `None`: the server sent none, and only the length is.
    pub verified: Option<&'static str>,
    /// How often the object was replaced under the download.
    pub restarts: u32,
    /// From the first request to the end.
    pub elapsed: Duration,
}

/// Runs the command: downloads, reports, handles Ctrl-C, and says how it went. Needs a multi-threaded runtime to be fast.
///
/// The first Ctrl-C saves what is there and ends the download; a second one ends the process at once.
pub async fn run(args: GetArgs) -> ExitCode {
    let cancel = CancellationToken::new();
    let interrupted = cancel.clone();
    let _signals = AbortOnDropHandle::new(tokio::spawn(async move {
        while tokio::signal::ctrl_c().await.is_ok() {
            if interrupted.is_cancelled() {
                std::process::exit(130);
            }
            interrupted.cancel();
        }
    }));
    let json_to_stdout = args.json && !args.to_stdout();
    let events: Box<dyn Write + Send> = if json_to_stdout {
        Box::new(io::stdout())
    } else {
        Box::new(io::stderr())
    };
    // As a file of its own, which is written without line buffering.
    let stdout = match io::stdout().as_fd().try_clone_to_owned() {
        Ok(stdout) => Box::new(fs::File::from(stdout)),
        Err(error) => {
            let _gone = writeln!(
                io::stderr(),
                "pinrange: cannot use standard output: {error}"
            );
            return ExitCode::from(74);
        }
    };
    match download(&args, stdout, events, &cancel).await {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            // Whoever reads the JSON from standard error has this line as an event.
            if !args.json || json_to_stdout {
                let _gone = writeln!(io::stderr(), "pinrange: {error}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Downloads `args.url` to where `args` say. `stdout` gets the bytes for `-o -`, on a blocking thread; `events` gets the
/// messages: JSON lines with `--json`, otherwise the human's.
///
/// Cancelling `cancel` ends it with [`GetError::Interrupted`] after what has arrived was saved. Dropping the future
/// ends it at once; the next run resumes from what was last saved.
pub async fn download(
    args: &GetArgs,
    stdout: Box<dyn Write + Send>,
    events: Box<dyn Write + Send>,
    cancel: &CancellationToken,
) -> Result<Summary, GetError> {
    let console = Arc::new(Console::new(args.json, events));
    let result = match Download::prepare(args, &console, cancel) {
        Ok((download, target)) => download.run(target, stdout).await,
        Err(error) => Err(error),
    };
    match result {
        Ok(summary) => {
            console.done(&summary);
            console.lost().map_or(Ok(summary), Err)
        }
        Err(error) => {
            console.failed(error.exit_code(), &error.to_string());
            Err(error)
        }
    }
}

/// Where the bytes go.
enum Target {
    Stdout,
    /// A pipe or a device, which takes bytes in order and must not be renamed over.
    Special(PathBuf),
    File(PathBuf),
}

/// One run of the command.
struct Download<'a> {
    args: &'a GetArgs,
    client: Arc<Client>,
    console: Arc<Console>,
    origin: Uri,
    cancel: &'a CancellationToken,
    began: Instant,
}

impl<'a> Download<'a> {
    fn prepare(
        args: &'a GetArgs,
        console: &Arc<Console>,
        cancel: &'a CancellationToken,
    ) -> Result<(Self, Target), GetError> {
        let url::Parsed { uri: origin, basic } = url::parse(&args.url)?;
        let target = if args.to_stdout() {
            Target::Stdout
        } else {
            target(args, &origin)?
        };
        let mut headers = HeaderMap::new();
        for (name, value) in &args.headers {
            headers.append(name, value.clone());
        }
        if !headers.contains_key(AUTHORIZATION)
            && let Some(basic) =
                basic.map_or_else(|| netrc(args, &origin), |basic| Ok(Some(basic)))?
        {
            headers.insert(AUTHORIZATION, basic);
        }
        let client = Client::new(origin.clone(), headers, args.retries, Arc::clone(console));
        let download = Self {
            args,
            client: Arc::new(client),
            console: Arc::clone(console),
            origin,
            cancel,
            began: Instant::now(),
        };
        Ok((download, target))
    }

    async fn run(
        &self,
        target: Target,
        stdout: Box<dyn Write + Send>,
    ) -> Result<Summary, GetError> {
        match target {
            Target::Stdout => {
                let output = PathBuf::from("standard output");
                self.to_stream(stdout, &output).await
            }
            Target::Special(path) => {
                let opened = path.clone();
                let open = blocking(move || fs::File::options().write(true).open(opened)).await;
                let file = open.map_err(|error| GetError::Create {
                    path: path.clone(),
                    why: error.to_string(),
                })?;
                let summary = self.to_stream(Box::new(file), &path).await?;
                Ok(Summary {
                    file: Some(path),
                    ..summary
                })
            }
            Target::File(path) => self.to_file(path).await,
        }
    }

    /// The first thing to ask for when nothing is known and nothing is held.
    fn first_chunk(&self) -> ByteRange {
        ByteRange::whole(self.args.chunk_size).expect("a chunk has at least one byte")
    }

    /// After the object was replaced: whether to start over.
    fn restart(&self, restarts: &mut u32, now: &str) -> Result<(), GetError> {
        if *restarts >= self.args.max_restarts {
            return Err(GetError::KeptChanging(format!(
                "{}: the object was replaced again (now {now}), after {restarts} restarts; \
                 try when it rests, or raise --max-restarts",
                self.client.name()
            )));
        }
        *restarts += 1;
        self.console.note(
            "restart",
            &format!(
                "{}: the object was replaced (now {now}): starting over, {restarts} of {}",
                self.client.name(),
                self.args.max_restarts
            ),
        );
        Ok(())
    }

    async fn to_file(&self, path: PathBuf) -> Result<Summary, GetError> {
        let part = Arc::new(Part::open(path.clone(), &self.origin)?);
        let result = self.one_revision_or_another(&part).await;
        if result.is_err() && part.is_worthless() {
            part.discard();
        }
        let file = Some(path);
        result.map(|summary| Summary { file, ..summary })
    }

    /// Starts over where the object is replaced meanwhile, as often as that may be.
    async fn one_revision_or_another(&self, part: &Arc<Part>) -> Result<Summary, GetError> {
        let mut held = part.resume();
        let mut restarts = 0;
        loop {
            let resumed = held.take();
            let was_resumed = resumed.is_some();
            let now = match self.one_revision(part, resumed).await {
                Ok(summary) => {
                    return Ok(Summary {
                        restarts,
                        ..summary
                    });
                }
                Err(Stop::Failed(error)) => return Err(error),
                Err(Stop::Replaced(now)) => now,
            };
            if was_resumed {
                // What was left from an earlier run is no sign of an object that keeps changing.
                let name = self.client.name();
                let what = format!(
                    "{name}: the object was replaced since the interrupted download (now {now}): starting over"
                );
                self.console.note("restart", &what);
            } else {
                self.restart(&mut restarts, &now)?;
            }
            part.reset(None)?;
        }
    }

    /// One revision, from the first request to the renamed file.
    async fn one_revision(&self, part: &Arc<Part>, held: Option<Pin>) -> Result<Summary, Stop> {
        let first = match &held {
            None => self.first_chunk(),
            // If nothing is missing, its last byte shows whether the revision is still the object.
            Some(pin) => part
                .written()
                .missing(pin.size, self.args.chunk_size)
                .next()
                .or_else(|| ByteRange::from_bounds(pin.size.checked_sub(1)?, pin.size))
                .unwrap_or_else(|| self.first_chunk()),
        };
        let opening = tokio::select! {
            opening = self.client.open(first, held.as_ref()) => opening?,
            () = self.cancel.cancelled() => return Err(interrupted(part, held.as_ref()).into()),
        };
        match opening {
            Opening::Pinned {
                pin,
                first,
                body,
                expected,
            } => {
                if held.is_none() {
                    part.reset(Some(&pin))?;
                }
                self.pinned_to_file(part, pin, (first, body), expected)
                    .await
            }
            Opening::Whole(whole) => Ok(self.whole_to_file(part, whole).await?),
        }
    }

    async fn pinned_to_file(
        &self,
        part: &Arc<Part>,
        pin: Pin,
        first: (ByteRange, Frames),
        expected: Option<Expected>,
    ) -> Result<Summary, Stop> {
        let written = part.written();
        let resumed = written.len();
        self.console.begin(Some(pin.size), resumed);
        let verdict = expected.map(|expected| {
            let verdict = verify::follow(expected, part.file(), pin.size, part.prefix());
            AbortOnDropHandle::new(tokio::spawn(verdict))
        });

        let begun = first.0;
        let queue = written
            .missing(pin.size, self.args.chunk_size)
            .filter(move |r| *r != begun);
        let queue = Arc::new(Mutex::new(queue));
        let mut first = Some(first);
        let mut workers = JoinSet::new();
        for _ in 0..self.args.connections {
            workers.spawn(work(
                Arc::clone(&self.client),
                PartSink::new(Arc::clone(part)),
                pin.clone(),
                Arc::clone(&queue),
                first.take(),
            ));
        }
        let mut saves = JoinSet::new();
        let result = tokio::select! {
            result = join(&mut workers) => result,
            error = self.save_regularly(part, resumed, &mut saves) => Err(error.into()),
            () = self.cancel.cancelled() => Err(interrupted(part, Some(&pin)).into()),
        };
        // Nobody writes to the part file any more when this returns, nor holds its lock.
        workers.shutdown().await;
        saves.shutdown().await;
        if let Err(stop) = result {
            if let Stop::Failed(_) = stop
                && let Err(error) = Arc::clone(part).commit().await
            {
                self.console
                    .note("warning", &format!("the progress is not saved: {error}"));
            }
            return Err(stop);
        }

        let verified = match verdict {
            Some(verdict) => {
                let verdict = tokio::select! {
                    verdict = verdict => verdict,
                    () = self.cancel.cancelled() => {
                        Arc::clone(part).commit().await?;
                        return Err(interrupted(part, Some(&pin)).into());
                    }
                };
                Some(self.judge(part, verdict.map_err(io::Error::other).flatten())?)
            }
            None => None,
        };
        Arc::clone(part).publish().await?;
        let etag = Some(pin.etag.as_field_value().to_owned());
        Ok(self.summary(pin.size, resumed, etag, verified))
    }

    /// Without a pin there is no second connection and no second try at the rest: a cut stream begins anew.
    async fn whole_to_file(&self, part: &Arc<Part>, whole: Whole) -> Result<Summary, GetError> {
        let mut patience = Patience::default();
        let mut whole = whole;
        let (bytes, etag, expected) = loop {
            part.reset(None)?;
            self.console.begin(whole.length, 0);
            let mut sink = PartSink::new(Arc::clone(part));
            let what = loop {
                let at = whole.body.at;
                let frame = tokio::select! {
                    frame = whole.body.next() => frame,
                    () = self.cancel.cancelled() => return Err(interrupted(part, None)),
                };
                match frame {
                    Ok(Some(bytes)) => {
                        self.console.advance(bytes.len() as u64);
                        sink.put(at, bytes)?;
                    }
                    Ok(None) => break None,
                    Err(Cut::TooLong) => return Err(self.client.too_long()),
                    Err(Cut::Passing(what)) => break Some(what),
                }
            };
            let Some(what) = what else {
                sink.flush()?;
                break (whole.body.at, whole.etag, whole.expected);
            };
            whole = tokio::select! {
                again = self.client.whole_again(&mut patience, what) => again.map_err(|stop| match stop {
                    Stop::Failed(error) => error,
                    Stop::Replaced(_) => unreachable!("a request without a pin"),
                })?,
                () = self.cancel.cancelled() => return Err(interrupted(part, None)),
            };
        };
        let verified = match expected {
            Some(expected) => {
                let verdict = verify::follow(expected, part.file(), bytes, part.prefix()).await;
                Some(self.judge(part, verdict)?)
            }
            None => None,
        };
        Arc::clone(part).publish().await?;
        Ok(self.summary(bytes, 0, etag, verified))
    }

    /// Turns a checksum's verdict into the algorithm's name, or into the error.
    fn judge(
        &self,
        part: &Part,
        verdict: io::Result<Result<&'static str, String>>,
    ) -> Result<&'static str, GetError> {
        verdict.map_err(|error| part.cannot_read(&error))?.or_else(|what| {
            let kept = part.distrust()?;
            Err(GetError::Data(format!(
                "{}: {what}; the bytes are kept in {}, run the same command again to download anew",
                self.client.name(),
                kept.display()
            )))
        })
    }

    /// Ends only with an error. Dropped, it may leave a save under way in `saves`.
    async fn save_regularly(
        &self,
        part: &Arc<Part>,
        saved: u64,
        saves: &mut JoinSet<Result<(), GetError>>,
    ) -> GetError {
        let mut saved = saved;
        let mut tick = tokio::time::interval(SAVE_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tick.tick().await;
        loop {
            tick.tick().await;
            self.console.tick();
            let written = part.written().len();
            if written != saved {
                let part = Arc::clone(part);
                saves.spawn_blocking(move || part.commit_now());
                if let Err(error) = join(saves).await {
                    return error;
                }
                saved = written;
            }
        }
    }

    fn summary(
        &self,
        bytes: u64,
        resumed: u64,
        etag: Option<String>,
        verified: Option<&'static str>,
    ) -> Summary {
        let elapsed = self.began.elapsed();
        Summary {
            file: None,
            bytes,
            resumed,
            etag,
            verified,
            restarts: 0,
            elapsed,
        }
    }
}

fn interrupted(part: &Part, pin: Option<&Pin>) -> GetError {
    GetError::Interrupted(match pin {
        Some(pin) => format!(
            "{} of {} bytes are in {}; run the same command again to resume",
            part.written().len(),
            pin.size,
            part.path().display()
        ),
        None => "nothing was kept; run the same command again".to_owned(),
    })
}

/// One connection's life: chunk after chunk until none is left.
async fn work<Q>(
    client: Arc<Client>,
    mut sink: PartSink,
    pin: Pin,
    queue: Arc<Mutex<Q>>,
    first: Option<(ByteRange, Frames)>,
) -> Result<(), Stop>
where
    Q: Iterator<Item = ByteRange>,
{
    if let Some((range, body)) = first {
        client.stretch(&pin, range, Some(body), &mut sink).await?;
    }
    loop {
        let Some(range) = queue.lock().next() else {
            return Ok(());
        };
        client.stretch(&pin, range, None, &mut sink).await?;
    }
}

/// Waits for all of them, or for the first that fails.
async fn join<E: 'static>(tasks: &mut JoinSet<Result<(), E>>) -> Result<(), E> {
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic()))?;
    }
    Ok(())
}

/// A symbolic link is followed, as curl does: its target gets the bytes and the part file beside it.
fn target(args: &GetArgs, origin: &Uri) -> Result<Target, GetError> {
    let path = args
        .output
        .clone()
        .map_or_else(|| url::file_name(origin), Ok)?;
    let path = fs::canonicalize(&path).unwrap_or(path);
    match fs::metadata(&path) {
        Ok(meta) if meta.is_dir() => {
            let why = "it is a directory; name the file in it".to_owned();
            Err(GetError::Create { path, why })
        }
        Ok(meta) if !meta.is_file() => Ok(Target::Special(path)),
        _ => Ok(Target::File(path)),
    }
}

/// Basic credentials for `origin`'s host, where the user asked for them and the file has some.
fn netrc(args: &GetArgs, origin: &Uri) -> Result<Option<HeaderValue>, GetError> {
    let path = match (&args.netrc_file, args.netrc) {
        (Some(path), _) => path.clone(),
        (None, true) => std::env::home_dir().unwrap_or_default().join(".netrc"),
        (None, false) => return Ok(None),
    };
    let failed = |why: String| GetError::Usage(format!("cannot use {}: {why}", path.display()));
    let text = fs::read(&path).map_err(|error| failed(error.to_string()))?;
    // The parser knows no comments.
    let lines = text
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.trim_ascii().starts_with(b"#"));
    let text: String = lines
        .flat_map(|line| percent_encode(line, PERCENT).chain(["\n"]))
        .collect();
    let netrc =
        netrc::Netrc::parse(BufReader::new(text.as_bytes())).map_err(|error| match error {
            netrc::Error::Io(error) => failed(error.to_string()),
            netrc::Error::Parse(_, line) => failed(format!("line {line} is malformed")),
        })?;
    let host = origin.host().unwrap_or_default();
    let port = origin.port_u16();
    let machine = netrc
        .hosts
        .iter()
        .find(|(name, machine)| {
            name.eq_ignore_ascii_case(host) && machine.port.is_none_or(|p| port == Some(p))
        })
        .map(|(_, machine)| machine)
        .or(netrc.default.as_ref());
    Ok(machine.map(|machine| {
        let decode = |text: &str| percent_decode_str(text).collect::<Vec<u8>>();
        let password = machine.password.as_deref().unwrap_or_default();
        url::basic(&decode(&machine.login), &decode(password))
    }))
}

/// `16MiB`, `64K`, `1048576`: at least 1.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        _ => return Err("write a size like 16MiB, 512K or 1048576".into()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "write a size like 16MiB, 512K or 1048576")?;
    match number.checked_mul(1 << shift) {
        None | Some(0) => Err("the size has to be between 1 byte and 2^64 bytes".into()),
        Some(size) => Ok(size),
    }
}

/// `Name: value`. What decides over bytes, pins and framing is not the user's to set.
fn parse_header(text: &str) -> Result<(HeaderName, HeaderValue), String> {
    let (name, value) = text
        .split_once(':')
        .ok_or("write a header as 'Name: value'")?;
    let name: HeaderName = name
        .trim()
        .parse()
        .map_err(|_| "the header's name is malformed")?;
    let ours = [
        "range",
        "accept-encoding",
        "connection",
        "content-length",
        "transfer-encoding",
        "te",
    ];
    if ours.contains(&name.as_str()) || name.as_str().starts_with("if-") {
        return Err(format!("{name} is set by pinrange itself"));
    }
    let mut value: HeaderValue = value
        .trim()
        .parse()
        .map_err(|_| "the header's value is malformed")?;
    value.set_sensitive(true);
    Ok((name, value))
}
