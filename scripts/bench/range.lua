-- wrk: random ranges of one object, each aligned to its own length and pinned by If-Match.
--
--     wrk … -s range.lua URL -- SIZE LENGTH ETAG SEED [unlike] [paced]
--
-- With "unlike", a field of its own tells each request from the others, as a signature does; else they differ in the range alone.
-- With "paced", each connection waits for one to three milliseconds after an answer, and no core is ever busy with the load alone.
--
-- The requests are written before the clock runs: what the load costs is taken from the same cores as what it measures.

local thread_count = 0

function setup(thread)
    thread:set("number", thread_count)
    thread_count = thread_count + 1
end

function init(args)
    local size, length, etag, seed = tonumber(args[1]), tonumber(args[2]), args[3], tonumber(args[4])
    local unlike
    for index = 5, #args do
        unlike = unlike or args[index] == "unlike"
        if args[index] == "paced" then
            delay = function() return math.random(1, 3) end
        end
    end
    math.randomseed(seed * 1000 + number)
    local stretches = math.max(1, math.floor(size / length))
    requests = {}
    for index = 1, math.min(4 * stretches, 16384) do
        local first = math.random(0, stretches - 1) * length
        local fields = {
            ["Range"] = string.format("bytes=%d-%d", first, first + length - 1),
            ["If-Match"] = etag,
        }
        if unlike then
            fields["X-Turn"] = string.format("%d-%d-%06d", seed, number, index)
        end
        requests[index] = wrk.format("GET", nil, fields)
    end
    turn = 0
end

function request()
    turn = turn % #requests + 1
    return requests[turn]
end

-- The last line of the output: figures as JSON, times in microseconds.
function done(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '\n{"requests":%d,"microseconds":%d,"bytes":%d,"p50":%d,"p99":%d,"p999":%d,"status":%d,"broken":%d}\n',
        summary.requests, summary.duration, summary.bytes,
        latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
        errors.status, errors.connect + errors.read + errors.write + errors.timeout))
end
