-- For wrk: every request asks for another query, so that nothing on the way can profit from repetition.
-- nginx gives the same small page for all, and the number back in a field of its answer.

local before, after
-- Each run begins elsewhere. Below 10^14, where Lua would turn to exponents.
local number = os.time() % 1000000 * 10000000

function init(args)
    local whole = wrk.format("GET", wrk.path .. "?number=")
    local place = whole:find("?number=", 1, true) + #"?number="
    before, after = whole:sub(1, place - 1), whole:sub(place)
end

function request()
    number = number + 1
    return before .. number .. after
end
