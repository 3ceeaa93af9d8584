"""The moves of the ledger, each one Lua script: atomic in Redis, and harmless when made twice. Keys and arguments are as `ledger` passes them."""

_ENDED = """
local state = redis.call('HGET', INFO, 'state')
if state == 'cancelled' or state == 'completed' then return 0 end
"""

ISSUE = (
    "local INFO = KEYS[4]"
    + _ENDED
    + """
if tonumber(redis.call('HGET', INFO, 'issued') or '0') ~= tonumber(ARGV[1]) then return 0 end
redis.call('XADD', KEYS[1], '*', 'seq', redis.call('INCR', KEYS[2]), 'index', ARGV[1], 'data', ARGV[2])
redis.call('HSET', KEYS[3], ARGV[1], 'q:-1:0:' .. ARGV[3])
redis.call('HINCRBY', INFO, 'issued', 1)
return 1
"""
)

ISSUE_REPLAY = (
    "local INFO = KEYS[4]"
    + _ENDED
    + """
if redis.call('LREM', KEYS[5], 1, ARGV[4]) == 0 then return 0 end
redis.call('XADD', KEYS[1], '*', 'seq', redis.call('INCR', KEYS[2]), 'index', ARGV[1], 'data', ARGV[2])
redis.call('HSET', KEYS[3], ARGV[1], 'q:-1:0:' .. ARGV[3])
redis.call('HINCRBY', INFO, 'replaying', -1)
return 1
"""
)

REPLAY = (
    "local INFO = KEYS[3]"
    + _ENDED
    + """
if redis.call('XDEL', KEYS[1], ARGV[1]) == 0 then return 0 end
redis.call('RPUSH', KEYS[2], ARGV[2])
redis.call('HINCRBY', INFO, 'dead', -1)
redis.call('HINCRBY', INFO, 'replaying', 1)
return 1
"""
)

START = """
local row = redis.call('HGET', KEYS[1], ARGV[1])
if not row then return 'gone' end
local place, start, attempt, max_lag = string.match(row, '(%a):(-?%d+):(%d+):(%d+)')
if place ~= 'q' and place ~= 'r' then return 'done' end
local held = ARGV[2]
if held ~= redis.call('HGET', KEYS[2], 'version') and held ~= redis.call('HGET', KEYS[2], 'loading') then return 'stale' end
attempt = tonumber(attempt) + 1
if attempt > tonumber(ARGV[3]) then return 'spent' end
redis.call('HSET', KEYS[1], ARGV[1], 'r:' .. held .. ':' .. attempt .. ':' .. max_lag)
return attempt
"""

ADVANCE = """
local row = redis.call('HGET', KEYS[4], ARGV[1])
local place, start, attempt, max_lag
if row then place, start, attempt, max_lag = string.match(row, '(%a):(-?%d+):(%d+):(%d+)') end
if place ~= ARGV[5] or attempt ~= ARGV[2] then
  redis.call('HINCRBY', KEYS[5], 'superseded', 1)
  return 0
end
redis.call('XADD', KEYS[2], '*', 'seq', redis.call('INCR', KEYS[3]), 'index', ARGV[1], 'data', ARGV[7])
redis.call('HSET', KEYS[4], ARGV[1], ARGV[6] .. ':' .. ARGV[8] .. ':' .. attempt .. ':' .. max_lag)
redis.call('XACK', KEYS[1], ARGV[4], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return 1
"""

GIVE_UP = """
redis.call('XACK', KEYS[1], ARGV[3], ARGV[2])
if redis.call('XDEL', KEYS[1], ARGV[2]) == 0 then return 0 end
local row = ARGV[1] ~= '' and redis.call('HGET', KEYS[4], ARGV[1])
if row and string.find(ARGV[6], string.sub(row, 1, 1), 1, true) then
  redis.call('HDEL', KEYS[4], ARGV[1])
  redis.call('HINCRBY', KEYS[5], 'dead', 1)
else
  redis.call('HINCRBY', KEYS[5], 'unreadable', 1)
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[5], '*', 'seq', redis.call('INCR', KEYS[3]), 'data', ARGV[4])
return 1
"""

_OURS = """
if redis.call('HGET', INFO, 'trainer') ~= ARGV[1] then return -1 end
"""

ANNOUNCE = (
    "local INFO = KEYS[1]"
    + _OURS
    + """
redis.call('HSET', INFO, 'version', ARGV[2])
redis.call('HDEL', INFO, 'loading')
local rows = redis.call('HGETALL', KEYS[4])
for i = 1, #rows, 2 do
  local start, rest = string.match(rows[i + 1], 'r:(-?%d+):(.*)')
  if start and tonumber(start) > tonumber(ARGV[2]) then redis.call('HSET', KEYS[4], rows[i], 'r:' .. ARGV[2] .. ':' .. rest) end
end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[4], '*', 'seq', redis.call('INCR', KEYS[3]), 'data', ARGV[3])
return 1
"""
)

SKIP = (
    "local INFO = KEYS[1]"
    + _OURS
    + """
local row = redis.call('HGET', KEYS[2], ARGV[2])
if not row or string.sub(row, 1, 1) ~= 's' then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HINCRBY', INFO, 'skipped', 1)
redis.call('XACK', KEYS[3], ARGV[4], ARGV[3])
redis.call('XDEL', KEYS[3], ARGV[3])
return 1
"""
)

PLAN = (
    "local INFO = KEYS[3]"
    + _OURS
    + """
for i = 4, #ARGV do
  local row = redis.call('HGET', KEYS[2], ARGV[i])
  if row then redis.call('HSET', KEYS[2], ARGV[i], 't' .. string.sub(row, 2)) end
end
redis.call('HSET', KEYS[1], ARGV[2], ARGV[3])
return 1
"""
)

LOADING = "local INFO = KEYS[1]" + _OURS + "redis.call('HSET', INFO, 'loading', ARGV[2]) return 1"

COMMIT = (
    "local INFO = KEYS[1]"
    + _OURS
    + """
local version = redis.call('HGET', INFO, 'version')
if version == ARGV[3] then return 0 end
if version ~= ARGV[2] then return -1 end
local n = tonumber(ARGV[9])
for i = 10, 9 + n do redis.call('HDEL', KEYS[2], ARGV[i]) end
redis.call('HINCRBY', INFO, 'consumed', n)
redis.call('HSET', INFO, 'version', ARGV[3])
redis.call('HDEL', INFO, 'loading')
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[6], '*', 'seq', redis.call('INCR', KEYS[4]), 'data', ARGV[4])
redis.call('XADD', KEYS[5], 'MAXLEN', '~', ARGV[7], '*', 'seq', redis.call('INCR', KEYS[6]), 'data', ARGV[5])
for i = 10 + n, #ARGV do
  redis.call('XADD', KEYS[7], 'MAXLEN', '~', ARGV[8], '*', 'seq', redis.call('INCR', KEYS[8]), 'data', ARGV[i])
end
return 1
"""
)

TURN = """
if redis.call('LLEN', KEYS[2]) ~= tonumber(ARGV[1]) then return -1 end
local version = redis.call('HGET', KEYS[1], 'version')
local effective = version and tonumber(version) + 1 or 0
redis.call('RPUSH', KEYS[2], effective .. ':' .. ARGV[2])
return effective
"""

COUNT = """
local places = {}
for _, row in ipairs(redis.call('HVALS', KEYS[2])) do places[#places + 1] = string.sub(row, 1, 1) end
return {redis.call('HMGET', KEYS[1], 'issued', 'consumed', 'dead', 'cancelled', 'replaying', 'skipped'), places}
"""

CLOSE = """
local left = redis.call('HLEN', KEYS[2]) + tonumber(redis.call('HGET', KEYS[1], 'replaying') or '0')
redis.call('HINCRBY', KEYS[1], 'cancelled', left)
redis.call('HSET', KEYS[1], 'replaying', 0)
for i = 2, #KEYS do redis.call('DEL', KEYS[i]) end
return left
"""
