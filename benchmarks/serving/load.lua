-- wrk -s load.lua URL -- FOLDER COUNT PATH TYPE PAUSE_MS: posts FOLDER/1 to FOLDER/COUNT in turn, again
-- and again, with a pause after each answer on a connection, and prints the result as one line of JSON.
local requests, turn = {}, 0

function init(args)
  for number = 1, tonumber(args[2]) do
    local file = assert(io.open(args[1] .. "/" .. number, "rb"))
    requests[number] = wrk.format("POST", args[3], {["Content-Type"] = args[4]}, file:read("*a"))
    file:close()
  end
  local pause = tonumber(args[5])
  if pause > 0 then
    delay = function() return pause end
  end
end

function request()
  turn = turn % #requests + 1
  return requests[turn]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "p50_ms": %.3f, "p95_ms": %.3f, "p99_ms": %.3f, ' ..
    '"connect": %d, "read": %d, "write": %d, "timeout": %d, "status": %d}\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000,
    latency:percentile(95) / 1000, latency:percentile(99) / 1000,
    errors.connect, errors.read, errors.write, errors.timeout, errors.status))
end
