"""Write the quick-start corpus: short, varied English sentences, the same ones on every run.

The sentences come from the small grammar below, grouped by topic so that what is done fits who does it.
A line ``== topic`` opens a topic, ``name = a; b; c`` is a word list of that topic (lists under
``shared`` belong to all of them) and ``* text`` is a sentence template; an indented line continues
the one above. In lists and templates ``{name}`` takes an entry of a list, ``[a|b|c]`` one of the
given options and ``{2..9}`` a number between the two. Everything here is made up for this project
(Apache-2.0); the "news" reports nothing that happened.

Usage: ``python tests/generate_sentences.py [--output PATH]``
"""

from __future__ import annotations

import argparse
import random
import re
from pathlib import Path

COUNT = 12_000  # sentences in all
PER_TEMPLATE = 90  # at most this many from one template
OVERLAP = 0.65  # two sentences of a template share at most this part of their words
OUTPUT = Path(__file__).parents[1] / "fmicl_text" / "quickstart" / "sentences.txt"

SLOT = re.compile(r"\{([^{}]+)\}|\[([^\[\]{}]*)\]")
AN = re.compile(r"\ba (?=(?!one\b|once\b|uni[^dmn]|us[eu]|eu)[aeiou]|hour|honest|heir|8|11\b|18\b)", re.I)
GRAMMAR = """
== shared
weekday = Monday; Tuesday; Wednesday; Thursday; Friday; Saturday; Sunday
month = January; February; March; April; May; June; July; August; September; October; November; December
color = red; blue; green; yellow; black; white; brown; gray; orange; purple; pink
few = two; three; four; five; six
country = France; Germany; Spain; Italy; Greece; Turkey; Egypt; India; China; Japan; Brazil; Mexico; Canada;
  Kenya; Nigeria; Norway; Poland; Ukraine; Russia; Iran; Iraq; Pakistan; Thailand; Vietnam; Indonesia;
  Australia; Chile; Peru; Argentina; Syria; Lebanon; Sudan; Portugal; Finland
city = London; Paris; Berlin; Madrid; Rome; Athens; Cairo; Mumbai; Beijing; Tokyo; Moscow; Istanbul; Nairobi;
  Lagos; Toronto; Chicago; Boston; Sydney; Lima; Bangkok; Jakarta; Warsaw; Vienna; Dublin; Lisbon; Oslo;
  Seoul; Karachi; Baghdad; Damascus
scene = on a gray winter afternoon; beneath a cloudless sky; while a small crowd looks on; in the soft evening
  light; as dark clouds gather; on a warm summer evening; early on a {weekday} morning; as the church bells
  ring; in bright midday sun; while a light rain falls; on the first day of spring; not far from the main road
calm = while a friend looks on; for the second time today; with great patience; without saying a word; as the
  radio plays softly; late on {weekday} night; to pass the time; with a broad smile; after a long day
day = on the first day of spring; on a {month} evening; late on {weekday} night; every {weekday}; on the last
  day of {month}
said = , officials said on {weekday}; , local media reported; , according to a government statement; , a
  spokeswoman told reporters; , the state news agency reported; , people familiar with the matter said; , a
  radio station said; , witnesses and officials said
ask = I searched for hours without luck:; a silly question, perhaps:; can anybody here tell me:; my sister and
  I cannot agree:; I am new to this, so forgive me:; just out of curiosity:; asking for a friend:
== cooking in pictures
who = a cook; a woman in an apron; a man; an old lady; a teenage boy; the baker; a grandmother; a kitchen hand
cut = slicing an onion; dicing carrots; peeling a potato; chopping parsley; mincing garlic; halving a lemon;
  coring an apple; shredding a cabbage; trimming the fat from a steak; filleting a trout; grating a block of
  cheese; cutting a cucumber into thin rounds; cubing a ripe mango
with = with a sharp knife; on a wooden board; next to the sink; for the evening meal; at a marble counter;
  very carefully; while the oven heats up
heat = stirring a pot of soup; frying eggs in butter; boiling pasta; browning minced beef in a pan; simmering
  tomato sauce; toasting slices of bread; grilling sausages; roasting chestnuts; steaming broccoli; poaching a
  salmon; melting chocolate over hot water; deep-frying shrimp
bake = bread; a cheesecake; ginger cookies; an apple pie; cinnamon rolls; blueberry muffins; a lasagna;
  stuffed peppers; a tray of biscuits; two pizzas
mix = flour and water; eggs and sugar; oil and vinegar; yogurt and honey; rice and beans; cream and cocoa;
  oats and raisins; tuna and mayonnaise
vessel = a glass bowl; a steel pan; a large jar; a plastic container; a blender; a clay dish
food = grapes; sushi; pancakes; noodles; fried chicken; salad; strawberries; dumplings; corn; tacos; olives;
  sandwiches; meatballs; waffles
* {who} is {cut} {with}.
* {who} is {heat} [on the stove|over a low flame|in a busy kitchen|at a campsite].
* {who} [takes|is taking] {bake} out of the oven[| {calm}].
* someone is mixing {mix} in {vessel}[| {calm}].
* {mix} are being [mixed|stirred together|poured] [into|in] {vessel}.
* a plate of {food} [sits|is sitting|has been left] on a [kitchen|dinner|picnic|glass] table [beside|next to]
  a [cup of tea|folded napkin|jug of water|vase of tulips|candle].
* [two friends|three women|several children|a few tourists|some soldiers|the guests] are eating {food} [at a
  street stall|in the garden|with their fingers|from paper plates|around a low table|out of cardboard boxes].
* {who} pours [milk|olive oil|melted butter|cream|gravy|maple syrup|batter|broth] [into|over the food in]
  {vessel}[| {calm}].
== cooking questions
dish = risotto; beef stew; sourdough; custard; fried rice; lentil soup; homemade jam; chicken curry; cheese
  sauce; caramel; hummus; omelette; onion gravy; tomato relish
fault = too salty; too watery; lumpy; bitter; greasy; tasteless; far too sweet; pale and sticky
keep = cooked rice; raw chicken; fresh basil; hard cheese; leftover soup; mushrooms; boiled eggs; smoked fish;
  cut avocado; whipped cream; pancake batter
swap = plain yogurt instead of buttermilk; potato flour instead of cornstarch; apple juice instead of white
  wine; mashed banana instead of eggs; coconut milk instead of heavy cream; coconut oil instead of lard;
  ordinary onions instead of shallots; dried thyme instead of fresh thyme; brown sugar instead of molasses
* [|{ask} ]why does my {dish} always turn out {fault}?
* how long can I [safely keep|store|leave] {keep} in the [refrigerator|freezer|pantry]?
* can I use {swap} in [this recipe|a fruit cake|a stew|a vegan dish]?
* if your {dish} is {fault}, [you probably cooked it too long|lower the heat next time|try adding the liquid
  more slowly|check the age of your ingredients].
* you should never eat {keep} [that smells strange|left out overnight|without checking the date|from an open
  container].
* what is the best [pan for searing scallops|cut of meat for braising|flour for a crisp crust|temperature for
  roasting pork|spice for pumpkin soup|way to poach a pear|knife for boning a duck|rice for stuffed vine
  leaves|side dish for grilled trout], [in your opinion|and where can I learn more|if money is tight]?
== dogs
dog = a brown dog; a black and white dog; a small terrier; a shaggy sheepdog; a wet spaniel; a puppy; a
  greyhound; a golden retriever; a three-legged dog; a muddy poodle; a husky; a bulldog
dogs = two dogs; a pair of puppies; three hounds; several stray dogs; some sled dogs; a tan dog and a gray dog
place = through fallen leaves; across a green lawn; along the beach; beside a wooden fence; in a shallow
  stream; through tall grass; around an empty parking lot; along a dusty trail
toy = a tennis ball; a stick; a frisbee; a rubber bone; an old slipper; a rope; a plastic bottle; a glove
* {dog} is running {place}[| {scene}].
* {dog} [jumps to catch|is chewing on|is carrying|drops|digs up|refuses to give back] {toy}[| {scene}].
* {dogs} are [chasing each other|playing|wrestling|racing|sniffing around] {place} {scene}.
* {dogs} [fight over|pull at|are both biting|run after] {toy} while their owner [watches|laughs|talks on the
  phone|looks away].
* {dog} [leaps over a hurdle|swims toward a duck|sleeps on a couch|barks at a mail carrier|stands on its hind
  legs|sticks its head out of a car window|begs for a biscuit|rolls in the mud|guards a flock of sheep].
* the dog did not [come when it was called|like the new collar|eat its breakfast|want to go outside|recognize
  its old owner], [so we called the vet|which surprised everyone|and nobody knew why|as usual].
* {dog} being [washed in a tub|brushed by a girl|carried by a firefighter|led on a leash|judged at a
  show|examined by a vet|fed from a spoon].
== other animals
cap = a cat licks its paw on a windowsill; a horse gallops around a paddock; an elephant sprays dust over its
  back; a monkey swings from a branch; a squirrel buries an acorn; a rabbit nibbles a carrot; a parrot repeats
  a word; a cow grazes beside a stream; a hedgehog curls into a ball; a panda chews bamboo; a goat climbs a
  steep rock; a kitten plays with a ball of yarn; an owl stares from a hollow tree; a lizard basks on a stone;
  a tiger paces behind bars; a seal balances a ball on its nose; a camel kneels in the sand; a woodpecker
  drills into a trunk; a fox trots across a frozen field; a turtle crawls toward the sea; a bear catches a
  salmon in the river; a giraffe stretches for high leaves; a hamster runs in a wheel; a swan glides across
  the pond; a bat hangs upside down in a cave; a donkey pulls a wooden cart
when = in the early morning; while people take photographs; on a cold day; as the sun goes down; without
  making a sound; in front of a small crowd
many = sheep; geese; zebras; pigs; chickens; penguins; deer; flamingos; buffalo; ponies; ducks; llamas
* {cap} {when}.
* [a small group of|dozens of|a long line of] {many} [crossing a road|standing near a river|waiting by a
  gate|huddled together|resting in the shade|moving across an open plain][| {scene}].
* a [hawk|leopard|wolf|fox|wild cat] [waits for|chases|catches|loses sight of] [a mouse|a rabbit|a careless
  bird|a rat] in the [tall grass|forest|moonlight|bushes|early mist].
* no [penguins|wild kangaroos|lemurs|giraffes|jaguars] live in [Scotland|European forests|the
  Alps|Norway|Japan|the Arctic], as far as [we|biologists|the guides] know.
* a zoo in {city} has [welcomed a baby|lost its last|moved its oldest|put on show a rare]
  [gorilla|rhinoceros|panda|snow leopard|orangutan|elephant|koala|hippopotamus].
* [whales|dolphins|sea lions|otters|manatees] were seen [close to shore|playing behind a ferry|in the mouth of
  the river|trapped in fishing nets] on {weekday}.
== children
kid = a little girl; a toddler; a boy in a striped shirt; a child with curly hair; a barefoot boy; a girl
  wearing a tiara; a baby; a freckled kid; a small child in boots
olderkid = a little girl; a boy in a striped shirt; a girl wearing pigtails; a schoolboy; a barefoot boy; a
  child in a raincoat
kids = two boys; three sisters; a group of schoolchildren; several kids; twin girls; some toddlers; many
  children in uniform
* {kid} is [splashing in a puddle|laughing at soap bubbles|sitting on a swing|reaching for a balloon|pushing a
  toy truck|crying on a bench|sucking a lollipop|asleep in a stroller|covered in paint|holding a teddy bear].
* {olderkid} [climbs a rope ladder|slides down a yellow slide|blows out birthday candles|builds a tower of
  blocks|rides a scooter down the sidewalk|jumps on a trampoline|draws a dragon with chalk|ties a pair of
  shoelaces|hides behind the curtain|flies a paper kite|whispers a secret|counts to twenty aloud] [while a
  teacher watches|before lunch|on a sunny afternoon|for the first time|with a big grin].
* {kids} are [playing tag|building a sandcastle|having a pillow fight|skipping rope|hunting for painted
  eggs|making a snowman|feeding ducks|riding a carousel|running through a sprinkler|trading marbles|racing in
  sacks] [together|with their parents|during the holidays|before dinner|with loud shrieks].
* [my son|our daughter|her nephew|his niece|the youngest child] is afraid of [the dark|thunder|clowns|big
  dogs|deep water|the dentist|loud toilets|spiders].
* [|{ask} ]at what age should a child [learn to swim|get a phone|sleep in a proper bed|start school|walk to
  school alone|stop taking naps|receive pocket money]?
* [my son|our daughter|her nephew|his niece] would not [eat vegetables|share the crayons|go to bed|say sorry],
  [no matter what we tried|so there was no dessert|until we made it a game|although everyone asked politely].
== playing sport
sp = a goalkeeper dives to save a penalty; a tennis player hits a backhand; a surfer rides a tall wave; a
  skier races between the gates; a boxer lands a left hook; a gymnast swings on the parallel bars; a pitcher
  throws a curveball; a skateboarder grinds along a rail; a cyclist sprints for the finish line; a swimmer
  touches the wall first; a hurdler trips over the last hurdle; a wrestler pins his opponent; a climber hangs
  from an overhang; a fencer lunges at her rival; a jockey urges his horse over a fence; a striker heads the
  ball over the bar; a figure skater spins on one foot; a rower collapses over the oars; an archer aims at a
  distant target; a weightlifter drops the bar; a quarterback looks for a receiver; a snowboarder flips in
  midair; a batsman is bowled for nothing; a diver leaps from the high platform; a referee shows a yellow card
watched = as the crowd cheers; during training; in front of empty seats; to loud applause; on live television;
  at the national championships
gear = a numbered vest; a red cap; dark glasses; a knee brace; a silver medal
teams = two teams; girls in blue uniforms; old men; college students; soldiers off duty; office colleagues;
  prisoners
game = basketball; cricket; ice hockey; rugby; water polo; softball; badminton; soccer; table tennis; lacrosse
* {sp} {watched}.
* {teams} are playing {game} [for charity|in the heat|under floodlights|with great energy|against the local
  champions|before a small crowd].
* a [runner|skater|player|cyclist|rider] wearing {gear} is [stretching before the race|talking to the
  coach|sitting on the grass|being helped off the field|waving to fans|drinking from a bottle][| {scene}].
* is {game} harder to learn than {game}?
* {game} is more popular than {game} in {country}.
* [|{ask} ]how often should I [stretch|train|lift weights|rest|change my running shoes|do sit-ups] [before a
  marathon|to get stronger|after an injury|at my age|if I only run on weekends]?
* [swimming|yoga|jogging|rowing|cycling|brisk walking] is [gentler on the knees|better for the back|more
  tiring|less boring|cheaper] than [running|tennis|skiing|going to the gym|boxing].
== sports news
winner = the home side; the defending champions; the visitors; the youngest team in the league; the national
  women's team; the underdogs; the league leaders
* {winner} [beat their rivals|won the final|lost the semifinal|took the series] {2..5}-{0..1} [on
  {weekday}|after extra time|in front of a sellout crowd|despite missing their captain].
* {country} [beats|stuns|thrashes|edges past|holds] {country} in [basketball qualifier|hockey final|tennis
  tie|friendly match|rugby test|cricket opener]
* [the captain|the striker|the goalkeeper|the star forward|the young defender] [has been suspended after
  failing a drug test|was fined for insulting a referee|will retire after {3..9} years at the club|apologized
  for the defeat in {city}|was taken to hospital after a clash of heads] [on {weekday}|, the club said].
* {city} [will host|has withdrawn its bid for|hopes to stage|was chosen for] the [winter games|European
  championships|next world athletics meeting|marathon|youth games].
* the {19..34}-year-old [sprinter|swimmer|cyclist|rower|skier|high jumper] [broke the world record|won a
  second gold medal|missed the podium|pulled out with a knee injury|qualified for the final] in {city}.
* rain [stopped play in|delayed the start of|spoiled] the [cricket match|tennis final|golf tournament|baseball
  game] between {country} and {country}.
* [fans|supporters|players|club owners] [protested against|welcomed|were angry about|cannot understand] the
  [new ticket prices|plan for a bigger stadium|decision to cancel the match|sale of the young midfielder].
== music
inst = guitar; violin; piano; cello; flute; trumpet; harp; accordion; saxophone; banjo;mandolin;; clarinet
player = a man with a beard; a girl; an elderly woman; a street performer; a student; a boy in a suit; a
  soldier; a blind musician; a bearded priest; a nun
* {player} is playing [a|an old|a borrowed] {inst} [on a bridge|on stage|in a subway station|for a small
  audience|with closed eyes|beside a fireplace|at a wedding].
* {player} [is tuning|puts down|is repairing|sells|proudly holds up] [a|an old|an expensive] {inst}[| {calm}].
* [a choir|a brass band|a rock group|an orchestra|a jazz trio|a folk singer|a school band] [performs in a
  cathedral|rehearses for a concert|bows at the end of the show|waits behind the curtain|entertains
  shoppers|gives a free concert][| {day}].
* [is it too late|how hard is it|how long does it take] to learn the {inst} [at forty|without a teacher|if you
  cannot read music|as a busy parent]?
* [the melody is simple|the chorus is silly|the rhythm keeps changing|the bass is too loud], but [people love
  to dance to it|I cannot stop humming it|the song became a hit|the recording is wonderful].
* I prefer [opera|hip-hop|jazz|folk songs|heavy metal|chamber music|reggae|the blues] to [pop|country
  music|techno|marching bands|musicals|anything on the radio].
* [people|couples|teenagers|old friends|women in long skirts|wedding guests] are dancing [around a bonfire|in
  a ballroom|to loud music|in the rain|at a festival|on a rooftop|in the village square][| {day}].
== city street
ped = a man in a dark suit; a woman pushing a stroller; an old man with a cane; a courier; a nurse; a police
  officer; a girl with headphones; a man with a briefcase; a tourist with a map; a woman in a yellow coat
* {ped} [crosses the street|waits at a bus stop|leans against a lamppost|walks past a bakery|climbs the subway
  stairs|stops to tie a shoe|hails a taxi|stares at a shop window|feeds pigeons in the square|talks on a
  phone|eats lunch on the steps][| {scene}].
* {ped} is [standing|walking|waiting|resting] [under an umbrella|in a narrow alley|in front of a mural|beside
  a fountain|outside a bank|near a construction site|at a crosswalk][| {scene}].
* people are [crowded onto an escalator|lining up outside a theater|shopping at an open-air market|sitting at
  tables outside a cafe|handing out leaflets|looking up at a tall building|marching with banners] {scene}.
* a [vendor|farmer|woman|teenager|man in a straw hat] is selling [roasted nuts|flowers|newspapers|secondhand
  books|balloons|ice cream|hats|fresh fish|melons|phone cases] [on the corner|from a cart|at the station|along
  the promenade|by the roadside].
* the [street|square|avenue|market|bridge|alley] is [empty|crowded|covered with snow|lined with trees|lit by
  lanterns|being swept] [at night|during the festival|again|this week].
* a [worker|crew|carpenter|painter|bricklayer] is [repairing a roof|painting a fence white|digging a
  trench|welding a beam|pouring concrete|putting up scaffolding|fixing a street lamp][| {scene}].
* graffiti [covers|has appeared on|was removed from] the [side of a train|old warehouse|tunnel wall|school
  gate|bridge|shutters of a shop].
== vehicles
veh = bus; truck; taxi; van; tractor; motorcycle; bicycle; sports car; fire engine; ambulance; pickup;
  scooter; limousine; minivan
* a {color} {veh} [is parked|stands|has stopped|sits] [in front of a church|under a tree|beside a canal|at a
  gas station|next to a brick wall|in a flooded street|outside a hotel|on a gravel driveway][| {scene}].
* a {veh} [passes|turns toward|is stuck behind|follows|overtakes] a {color} {veh} {scene}.
* [a steam train|a freight train|a high-speed train|a subway car] [crosses a stone bridge|pulls into the
  station|comes out of a tunnel|curves along the coast|passes through fields of wheat][| {scene}].
* [a passenger jet|a small plane|a helicopter|a glider|a seaplane] is [landing|taking off|flying low over the
  hills|disappearing into a cloud|circling above the lake][| {scene}].
* [a sailboat|a canoe|a cargo ship|a ferry|a fishing boat|a yacht] [leaves the harbor|drifts on calm water|is
  tied to a dock|passes under a drawbridge|lies on its side in the mud|heads for the open sea][| {scene}].
* my car [makes a grinding noise|pulls to the left|smells of gasoline|shakes|stalls|drips oil] [when I
  brake|on cold mornings|at high speed|since I changed the battery|whenever it rains]; what could it be?
* [|{ask} ]how often should you [change the oil|rotate the tires|check the brakes|replace the air filter|flush
  the coolant] on a [diesel car|used van|ten-year-old truck|small taxi]?
== markets
up = rise; rally; edge higher; jump; recover; close higher; climb
down = fall; slide; plunge; close lower; slip; tumble; retreat
asset = stocks; bank shares; oil prices; gold prices; bond yields; Asian markets; European shares; wheat
  futures; copper prices; airline stocks; technology shares; coffee prices
good = on hopes of trade deal; after upbeat earnings; as inflation eases; as central bank cuts rates; after
  strong jobs data; on takeover talk; as tensions ease
bad = on fears of recession; after weak jobs data; amid supply glut; on slowing growth in China; as banks
  report losses; after surprise tax rise; as demand fades
* {asset} {up} {good}
* {asset} {down} {bad}
* the [index|benchmark|exchange's main gauge] [fell|rose|dropped|gained] {12..240}.{1..9} points [on
  {weekday}|in early trading|by midday|after two days of losses].
* the [euro|yen|pound|peso|Swiss franc] [weakened|strengthened|slipped|firmed] {1..3}.{1..9} percent against
  the dollar [on {weekday}|in thin trading|ahead of the election|by midday].
* shares of the [drug maker|carmaker|retailer|chip producer|insurance group|oil company|airline|brewer|mining
  firm] [tumbled after it cut its forecast|soared after a strong quarter|fell when the merger collapsed|hit a
  record high as sales beat expectations|were suspended as regulators opened an inquiry][|{said}].
* the central bank [raised|cut|is expected to lower|surprised markets by raising] [interest rates|its key
  rate|the lending rate] [for the third time this year|in an effort to curb inflation|on {weekday}|despite
  pressure from the government].
* consumer prices in {country} [rose|increased|climbed|fell] {1..9}.{1..9} percent in {month}, [driven by food
  and energy|less than economists had forecast|official figures showed|the sharpest change in a decade].
* unemployment in {country} [fell to|rose to|remained at] {4..14} percent [last month|in the third quarter|as
  factories hired more workers|as construction slowed|in {month}].
* [crude oil|natural gas|silver|sugar|soybean|corn|cotton] for {month} delivery [rose|fell|settled up|settled
  down] {2..90} cents [a barrel|an ounce|a bushel|a pound] in {city}.
== business
firm = the airline; a supermarket chain; a family-owned brewery; the phone company; a toy manufacturer; the
  shipbuilder; a furniture maker; the publisher; a steel producer; a clothing retailer; the railway operator
* {firm} [said it would|plans to|has agreed to|was forced to|is not going to] [cut {2..9},{1..9}00 jobs|close
  {few} sites|invest in new equipment|sell its overseas business|raise prices|buy a smaller rival|pay a fine
  of ${12..95} million|delay its stock market listing][|{said}].
* {firm} reported a [quarterly|full-year|record|surprise] [profit|loss] of ${11..940} million, [compared with
  ${11..940} million a year earlier|slightly more than forecast|its chairman said on {weekday}].
* workers at [a car plant|the main port|the national airline|a coal mine|a chocolate factory|the postal
  service] [went on strike|voted for a walkout|blocked the gates|stopped work] [on {weekday}|over
  pensions|after pay talks failed|demanding safer conditions|for the first time in {3..20} years][|{said}].
* the company [denied|confirmed|refused to comment on|did not explain] [reports of a takeover|the layoffs|the
  accounting error|rumors about its chief|the sudden fall in sales][|{said}].
* [small shops|hotels|restaurants|farmers|bookstores] are [struggling with|worried about|benefiting from|not
  affected by] [higher rents|online competition|the new tax|a weak currency|the tourist boom][|{said}].
== accidents
acc = bus plunges into ravine; train derails near station; ferry capsizes in rough seas; fire sweeps through
  market; coal mine collapses; helicopter crashes in mountains; gas explosion levels house; factory burns;
  crane topples onto street; migrant boat sinks; truck hits wedding party; bridge collapses during rush hour
accn = a bus crash; a train derailment; a hotel fire; a helicopter crash; a gas blast; a building collapse; a
  stampede at a stadium; a chain collision on a foggy highway; a factory fire; a plane crash
* at least {2..80} [dead|killed|hurt|injured] as {acc} in {country}
* {accn} [in|near|outside] {city} killed {2..60} people and [injured dozens|left {3..90} others hurt|trapped
  many more|closed the main road][|{said}].
* [officials|police|rescuers|witnesses|survivors|investigators] said [the driver had fallen asleep|the brakes
  failed|the wreck was still burning|the doors had been locked|nobody had been hurt|the cause was not yet
  known|the alarm never sounded|the pilot reported engine trouble].
* rescue teams [searched through the night for|found no sign of|are still looking for|have reached] {few}
  [fishermen|climbers|miners|children|sailors|hikers] [near the village|in thick fog|after the storm|close to
  the border][|{said}].
* a {19..79}-year-old [man|woman] was [seriously injured|killed|hurt] when [a tree fell on a car|a gas bottle
  exploded|a boat overturned|an elevator cable snapped|a truck ran a red light|the ice gave way]{said}.
* no one was injured when [a plane slid off the runway|a crane fell|lightning struck the church|the warehouse
  roof caved in|two trams collided|a boat ran aground|a house exploded] [in {city}|on {weekday} night|near the
  border|during the storm][|{said}].
* firefighters [fought|battled|struggled to control] [a blaze at a chemical plant|a forest fire near
  {city}|flames in a tower block|a fire in an old theater|a burning oil tank] [for {3..18} hours|on
  {weekday}|with help from the army|in strong winds][|{said}].
== weather
* heavy [rain|snow|storms|hail] [closed roads|delayed flights|left thousands without power|damaged
  crops|trapped drivers] [across {country}|in the north|along the coast|over the weekend][|{said}].
* [a hurricane|a cyclone|a typhoon|a tropical storm] [is moving toward|struck|has weakened off|flooded parts
  of] [the coast of {country}|the southern islands|the eastern provinces|the gulf]{said}.
* a magnitude {4..6}.{0..9} earthquake [shook|hit|struck|rattled] [northern {country}|southern {country}|an
  area near {city}|the seabed off {country}] [on {weekday}|early in the morning|but caused little damage|and
  triggered a tsunami warning].
* {weekday} will be [sunny|cloudy|windy|mild|bitterly cold|humid|foggy] with [a chance of showers|light
  winds|thunder in the evening|clear spells later].
* the [river|lake|canal|stream] [burst its banks after weeks of rain|reached its highest level in {12..90}
  years|has almost dried up because of the drought|is expected to overflow on {weekday}].
* thousands [fled|were evacuated|refused to leave|slept in shelters] as [wildfires spread|floodwaters rose|the
  volcano erupted|the storm approached|mudslides buried villages] in {country}.
* [the drought|the heat wave|the cold spell|the flood] has [killed cattle|ruined the harvest|forced schools to
  close|driven up food prices] in {country}[|{said}].
== elections and government
* voters in {country} [go to the polls|choose a new president|elect a parliament|head to second round] on
  {weekday} [amid tight security|after a bitter campaign|with no clear favorite]
* [the opposition|the ruling party|a former general|the prime minister|a left-wing coalition|the green party]
  [won|lost|claimed victory in|conceded defeat in|is ahead in|boycotted] the [election|vote|runoff|referendum]
  in {country}[|{said}].
* [the senate|parliament|the upper house|a committee of lawmakers|the city council|the cabinet]
  [approved|rejected|postponed a vote on|is debating|passed] a [bill|plan|proposal] to [raise the retirement
  age|ban plastic bags|legalize gambling|cut income tax|reform the police|limit campaign spending|build a new
  airport|protect tenants][|{said}].
* the [finance|foreign|health|defense|education|interior] minister [resigned|was dismissed|apologized|denied
  any wrongdoing|survived a confidence vote] [on {weekday}|over a spending scandal|after only {3..11}
  months|under pressure from his party].
* a poll shows that {30..79} percent of [voters|young people|pensioners|farmers|teachers] [support|oppose|do
  not trust|have never heard of] the [new law|governor|peace deal|tax reform|mayor's plan|treaty].
* thousands [protest|march|rally|demonstrate] in {city} against [corruption|fuel prices|austerity|a disputed
  vote|press censorship|nuclear power|police violence|pension cuts]
* turnout was [low|higher than expected|only {28..49} percent|highest in rural areas], [partly because of the
  snow|and young people stayed away|election officials said|according to early counts].
== diplomacy and conflict
* [rebels|gunmen|militants|government troops|separatists|soldiers] [attacked|captured|shelled|withdrew
  from|surrounded|retook] [a border town|an army base|a police station|an oil field|the airport|a hospital] in
  the [eastern province|disputed region|southern highlands|delta|far north][|{said}].
* a [car bomb|roadside bomb|suicide attack|drone strike|rocket|mortar shell] killed {2..40}
  [people|soldiers|civilians|police recruits|pilgrims] [near a checkpoint|outside a mosque|in the old
  quarter|at a crowded market|by the border] on {weekday}[|{said}].
* {country} and {country} [agree on|prepare|delay|suspend] [trade pact|border treaty|extradition deal|prisoner
  exchange|naval exercises|fishing agreement|visa-free travel]
* [island republic|northern neighbor|kingdom|new government] [expels|recalls|summons|welcomes|criticizes]
  [ambassador|diplomats|envoy] [over spying claims|after border clash|in row over visas|before peace talks]
* [refugees|aid workers|peacekeepers|hostages|foreign journalists] [arrived in|were turned back at|left|were
  freed near] [the capital|the frontier|the besieged city|a camp in the desert|the buffer zone] on {weekday}.
* the United Nations [called for|condemned|voted against|is investigating|has no plan for] [an immediate
  truce|the use of cluster bombs|new sanctions|attacks on schools|a larger peacekeeping force].
* [neighboring state|military junta|island republic|former colony] [denies|admits] [testing missile|violating
  airspace|arming rebels|building secret reactor|hacking ministry computers|sinking patrol boat]
== crime and courts
* a [court|judge|jury|tribunal] in {city} [sentenced|acquitted|convicted|refused to release] a [banker|former
  mayor|truck driver|doctor|smuggler|soldier|teacher|priest] accused of [fraud|bribery|manslaughter|selling
  forged passports|poisoning a rival|leaking secrets|tax evasion|stealing vaccines].
* police [arrested|are questioning|are searching for] a {18..66}-year-old [man|woman] [over|in connection
  with] [a jewelry robbery|the theft of a painting|a hit-and-run|an arson attack|a kidnapping|the stabbing
  outside a club|a series of burglaries][|{said}].
* [thieves|burglars|armed robbers|three masked men] [stole|escaped with|tried to take|were caught with]
  [diamonds worth millions|a van full of cigarettes|church silver|rare stamps|copper cable|{few} racing
  horses|a bronze statue|laptops from a school]{said}.
* the [suspect|defendant|accused man|former official] [pleaded not guilty|wept in court|did not
  testify|changed his story|will appeal|fled the country|faces up to {5..30} years in prison] [on {weekday}|,
  his lawyer said|, according to court papers].
* [the supreme court|an appeals court|a federal judge|the human rights court] [overturned|upheld|will hear a
  challenge to|has blocked] [the death sentence|a ban on headscarves|the travel restrictions|a ruling on
  same-sex marriage|limits on gun ownership|the patent on a cancer gene].
* customs officers [found|seized|discovered] [{2..60} kilos of cocaine|live tortoises|ivory|fake
  watches|bundles of banknotes|stolen antiquities] hidden in [a shipment of bananas|a spare tire|a
  suitcase|boxes of frozen squid|a fishing boat|sacks of cement][|{said}].
* [|{ask} ]is it legal to [record a phone call|keep a goat in a city|sell a broken phone|fly a drone over a
  park|collect rainwater|carry a pocket knife|sleep in a parked camper|burn garden waste|photograph a police
  station] [where you live|in {country}|without permission]?
* the [lawyer|prosecutor|judge|prison governor] said the [evidence|verdict|sentence|investigation|confession]
  was [unfair|too lenient|deeply flawed|not convincing|a disgrace|based on rumors].
== science
* [scientists|researchers|biologists|archaeologists|a team in {city}] have [discovered|found|described] [a new
  species of frog|the oldest known shark tooth|a bacterium that eats plastic|traces of an ancient river|a gene
  linked to deafness|a cave full of fossils|a material that repels water|a virus that infects algae].
* a study [suggests|shows|found|has cast doubt on the idea] that [coffee|regular exercise|laughter|singing in
  a choir|meditation|a diet rich in nuts|living near a park|bilingualism] [affects memory|lowers blood
  pressure|reduces stress|can slow aging|changes the brain|improves mood].
* {ask} why [does ice float on water|is the sky blue|do magnets stick to iron|does salt melt snow|do leaves
  change color|do cats always land on their feet|does hot water sometimes freeze faster|do bubbles pop|does
  metal feel colder than wood|does popcorn burst]?
* [a dinosaur|a mammoth|an ancient whale|a giant bear|a prehistoric crocodile|an early human]
  [skeleton|tooth|jaw|skull] was [dug up|uncovered|found by a schoolboy|sold at auction] in {country}.
* a [virus|molecule|living cell|bacterium|grain of pollen] is [much smaller than|far lighter than|nothing
  like] [a grain of sand|a human hair|a pea|a drop of mist].
== space
* a [rocket|probe|cargo capsule|weather satellite|spacecraft] [lifted off|was launched|exploded|lost power]
  [on {weekday}|after {few} delays|over the desert|as thousands watched|without a crew].
* astronomers [spotted|photographed|are studying|cannot explain] [a planet with two suns|a comet with a green
  tail|the collision of two galaxies|a star that dims every month|radio bursts from deep space|water vapor
  around a distant planet|a black hole at the heart of our galaxy].
* [|{ask} ]does [Mars|Venus|Jupiter|Saturn|Mercury|Neptune|Uranus] have [a solid surface|bright rings|more
  than {2..9} moons|a thick atmosphere|clouds of acid|a strong magnetic field|seasons like ours]?
* [|{ask} ]is [Mars|Venus|Jupiter|Saturn] [farther from us|smaller|hotter|brighter tonight|much colder] than
  [Mercury|Neptune|the North Star|Uranus|Pluto]?
* an astronaut [floats outside the station|repairs a solar panel|grows lettuce in orbit|exercises on a
  treadmill|sleeps strapped to a wall|waves at the camera|returns to Earth after {3..13} months].
* will we ever [live on Mars|receive a signal from aliens|mine the asteroids|see the far side of the galaxy]?
* [the eclipse|a meteor shower|the full moon|the comet] [could be seen|drew large crowds|surprised
  drivers|impressed the tourists] [in {country}|near {city}|last {weekday}].
== health news
* [measles|cholera|bird flu|malaria|a stomach virus|tuberculosis|polio|Ebola] [has killed {11..300} people|is
  spreading fast|is no longer a threat|has been detected|closed several schools] in {country}[|{said}].
* [doctors|nurses|surgeons|health officials|dentists|midwives] [warned|announced|were surprised to
  learn|complained] that [antibiotics are losing their power|the vaccine is safe|salaries have not
  risen|obesity is rising among children|heart attacks are more common in winter|stocks of blood are low].
* a [drug|pill|injection|therapy] for [migraine|diabetes|breast
  cancer|asthma|depression|arthritis|baldness|epilepsy] [was approved|failed in a large trial|has few side
  effects|costs too much|proved better than a placebo|is still years away].
* [smokers|office workers|pregnant women|older men|teenagers|night-shift nurses|people with high blood
  pressure] are [more likely|less likely|no more likely] to [catch colds|suffer a stroke|sleep badly|gain
  weight|lose their hearing|develop back pain] than [others|their neighbors|people thought].
* the [minister|hospital|agency|charity] [urged people to|told parents to|reminded visitors to] [wash their
  hands|get vaccinated|wear masks on trains|check medicine labels|boil drinking water|stay away from bats].
== health questions
* I have [a sore throat|a rash on my arm|a swollen ankle|ringing in my ears|a stiff neck|a dull
  headache|heartburn|a cramp in my calf] [every morning|after running|since {weekday}|that will not go
  away|whenever I travel]; should I see a doctor?
* [|{ask} ]is it [safe|healthy|a bad idea|normal] to [sleep with the window open|take vitamins every day|skip
  breakfast|crack your knuckles|run with a cold|fast for a whole day|nap after lunch|drink from an old well]?
* the dentist [pulled out|filled|polished|examined|could not save] [a wisdom tooth|my front tooth|the boy's
  milk tooth|a cracked molar|her lower teeth].
* [green tea|ginger|fish oil|garlic|turmeric|honey] [does not cure|may relieve|is often taken for|has little
  effect on] [a cold|joint pain|nausea|insomnia|an infection|high cholesterol].
* [my father|my aunt|our neighbor|a colleague] [broke a hip|had heart surgery|lost ten kilos|stopped
  smoking|fainted|caught pneumonia] [last winter|on a cruise|in {month}|at the age of {48..80}].
* [|{ask} ]how many [hours of sleep|calories|steps|glasses of water|minutes of sunlight|grams of protein] does
  [an adult|a teenager|a nursing mother|an athlete|a retired person] need each day?
== travel questions
* [|{ask} ]do I need a [visa|passport|return ticket] to [visit|enter|change planes in|take a cruise to]
  {country}?
* [|{ask} ]what is the cheapest way to [get from {city} to {city}|send luggage to {country}|see the temples of
  {country}|phone home from {country}|rent a car in {city}|travel to {country} with two bicycles]?
* [|{ask} ]is it [safe|common|wise] to [hitchhike|drink the tap water|camp on beaches|drive at night|bargain
  in shops|ride horses|swim in the rivers|tip waiters] in {country}?
* we [missed our connection|spent three nights|ran out of cash|rented a tiny apartment|got terribly lost|met
  friendly monks] in {city} [on our honeymoon|during a strike|in {month}|last year|on the second day].
* the [hotel|hostel|guesthouse|campsite|cabin|ferry] was [cleaner|noisier|farther from the center|cheaper|much
  smaller] than [the pictures suggested|we had hoped|the one we stayed in last time|the website claimed].
* if you visit {country} in {month}, [bring a raincoat|book your hotel early|avoid the coast|take the night
  train|expect long lines at museums|pack light clothes|try the local soup].
== computers
* my [laptop|phone|printer|tablet|router|keyboard|external drive|webcam|headset] [keeps freezing|will not turn
  on|gets very hot|is no longer recognized|makes a clicking sound|will not connect] [after the last
  update|since I spilled tea on it|since {weekday}|for no obvious reason].
* [|{ask} ]how can I [recover a deleted file|merge two spreadsheets|block pop-up windows|reset a forgotten
  password|speed up an old computer|back up my photos|remove a virus|share a printer|split a large
  document|sort a list by date] [without extra software|for free|quickly]?
* you should [restart the machine|install the missing driver|clear the cache|check the cable|run a memory
  test|replace the battery|update the firmware|disable the firewall briefly] [and see whether that
  helps|before you buy a new one|or ask the administrator|if the problem remains].
* the [function|loop|query|script|program] [fails with a syntax error|uses too much memory|never ends|ignores
  the last line] [when the input is large|since the upgrade|unless I add a print statement|in debug mode].
* [|{ask} ]what is the difference between [a compiler and an interpreter|a list and an array|a thread and a
  process|encryption and hashing|a router and a switch|memory and storage|a branch and a tag|HTTP and HTTPS]?
* [do not|never|it is unwise to] [store passwords in plain text|open attachments from strangers|unplug a drive
  while it is writing|copy code you do not understand|ignore compiler warnings|share your private key].
* [hackers|a software bug|a power cut|a careless employee|a broken undersea cable] [took
  down|disrupted|slowed] [a hospital network|the ticket system|a popular email service|the tax website|the
  stock exchange|an online bank] on {weekday}.
== pets
* my [cat|kitten] [scratches the sofa|refuses to use the litter box|only drinks from the faucet|is afraid of
  the vacuum cleaner|brings dead mice home|hides when guests come|vomits after eating]; what can I do?
* my [dog|puppy] [pulls on the leash|barks at the doorbell|chews our shoes|eats grass|growls at other
  dogs|snores|digs holes in the lawn|limps after walks]; what should I try?
* [|{ask} ]how often should I [bathe a long-haired dog|clean the fish tank|trim a rabbit's claws|feed a young
  snake|change the hamster's bedding|brush my cat's teeth|worm a puppy|let the parrot out of its cage]?
* [goldfish|hamsters|guinea pigs|canaries|tortoises|ferrets|budgies] [need more space than|live longer
  than|are quieter than] [you might think|mice|gerbils|most beginners expect].
* [chocolate|grapes|raw onions|chicken bones|lilies|antifreeze] can be [dangerous|deadly|very harmful] to
  [dogs|cats|puppies|pets], [so be careful|even in small amounts|according to most vets].
* we adopted a [deaf|one-eyed|shy|playful|very old|nervous|stray] [cat|greyhound|rabbit|pony|collie] from [a
  shelter|a farm|the neighbors|a retired breeder] and [it settled in quickly|the children adore it|it still
  hides under the bed|she now rules the house].
* a cat is [stuck in a tree|drinking from a toilet|chasing a laser dot|sitting in a cardboard box|hissing at a
  mirror|stretching on a rug|watching birds through the glass|being weighed by a vet|pawing at a fish bowl].
== money questions
* I spend about ${2..9}{1..9}0 a month on [my car|bus fares|rent|music lessons|unused subscriptions|cat food].
== gardening
* my [tomato plants|roses|cucumbers|lemon tree|basil|hydrangeas|orchid] [turned yellow|stopped growing|wilted
  overnight|did not flower|died] [after the frost|despite regular watering|this {month}|while we were away].
* [|{ask} ]when is the best time to [prune apple trees|plant garlic|sow carrots|move a peony|harvest
  pumpkins|divide irises|mow a new lawn|cut back lavender|spread compost]?
* a [gardener|woman in rubber boots|man with a wheelbarrow|volunteer|boy] is [raking leaves|watering
  flowers|digging up potatoes|trimming a hedge|planting a tree|pulling weeds|picking cherries|spraying an
  orchard|mowing the grass][| {scene}].
* [clay soil|a sandy bed|a shady corner|a windy balcony|a south-facing wall] is [good for|not suitable
  for|better than most places for] [ferns|figs|cacti|grapevines|lettuce|herbs|rhubarb|climbing roses].
* [snails|aphids|rabbits|caterpillars|deer|slugs] [ate every leaf of|are destroying|have never bothered] the
  [cabbages|tulips|beans|sunflowers|new shrubs|spinach] [in our street|this spring|behind the shed].
* [daffodils|poppies|lilacs|sunflowers|chrysanthemums|magnolias|snowdrops] [bloom earlier than|need more sun
  than|smell stronger than|are easier to grow than] [tulips|carnations|violets|daisies|azaleas|crocuses].
== home repair
* [|{ask} ]how do I [unblock a kitchen sink|hang a heavy mirror|remove old wallpaper|fix a dripping tap|patch
  a hole in plaster|stop a door from squeaking|sharpen a chisel|get rust off a hinge|level a wobbly table]?
* the [plumber|electrician|roofer|decorator|carpenter|locksmith] [came late|replaced the broken part|forgot
  his tools|charged too much|did not finish the job|left a mess] [on {weekday}|last week|yet again|as usual].
* [turn off the water before you replace a faucet|switch off the power before you change a socket|open a
  window before you strip paint|measure twice before you cut the board|put down an old sheet before you sand
  the floor|call a professional before you touch the gas pipe|check for cables before you drill into tile],
  [the manual says|my father always said|to be on the safe side].
* our [boiler|dishwasher|washing machine|refrigerator|water heater] [leaks|rattles|makes a humming noise|has
  stopped working], and [the warranty ended last {month}|nobody can come before {weekday}|we cannot afford a
  new one|guests arrive tomorrow].
* a man is [hammering a nail|painting a ceiling|tiling a bathroom|fixing a bicycle wheel|sanding a
  chair|climbing a ladder|drilling a hole in a wall|assembling a bookcase|changing a light bulb][| {calm}].
== definitions
thing = thermometer is an instrument for measuring temperature; blizzard is a severe storm with snow and
  strong wind; glacier is a slow river of ice; sonnet is a poem of fourteen lines; lighthouse is a tower that
  guides ships at night; decade is a period of ten years; compass is a device that points north; peninsula is
  land almost surrounded by water; synonym is a word with nearly the same meaning as another; fossil is the
  preserved remains of an ancient living thing; canal is a waterway dug by people; famine is a severe lack of
  food over a wide area; mirage is something you see that is not really there; orchard is a piece of land
  where fruit trees grow; dowry is property that a bride brings to her marriage; ballot is a vote cast in
  secret; rumor is a story that nobody has confirmed; anvil is an iron block on which metal is hammered; oasis
  is a green place in a desert; alibi is proof that someone was elsewhere
job = widow is a woman whose husband has died; carpenter is someone who makes things of wood; hostage is a
  person held against their will; burglar is a thief who enters buildings; pharmacist is a person who prepares
  and sells medicines; florist is a person who arranges and sells flowers; cartographer is somebody who draws
  maps; beekeeper is a person who raises bees for honey; orphan is a child whose parents are dead; pedestrian
  is a person traveling on foot; rookie is someone new to a job or sport; veteran is a person who once served
  in the army; landlord is the owner of a rented house; hermit is a person who chooses to live alone; tailor
  is someone who sews and alters clothes; apprentice is a young person learning a trade
verb = hesitate is to pause before acting; stroll is to walk slowly for pleasure; borrow is to take something
  for a while; forgive is to stop being angry with someone; exaggerate is to make something sound bigger than
  it is; evaporate is to turn from liquid into vapor; negotiate is to discuss terms until both sides agree;
  imitate is to copy how someone behaves; retreat is to move back from danger; eavesdrop is to listen in
  secret; devour is to eat quickly and hungrily; bribe is to pay someone to act dishonestly; stumble is to
  nearly fall while walking; smuggle is to bring in goods illegally; mourn is to feel sorrow for the dead;
  postpone is to move something to a later date; summon is to order someone to appear
* a {thing}.
* a {job}.
* to {verb}.
== notices
* the [library|swimming pool|clinic|post office|ticket office|car park|cathedral|playground] will be closed
  [on {weekday}|for repairs|until the end of {month}|because of staff illness|during the public holiday].
* [the sign says:|dear guests,|a friendly reminder:] please [switch off your phones|keep dogs on a leash|wash
  your hands|take off your shoes|stand behind the yellow line|return the tray|sign the visitors' book|lower
  your voice|wait to be seated|show your membership card].
* passengers [must not lean out of the windows|should keep their bags with them|are asked to have tickets
  ready|traveling to {city} must change at the next stop|with small children can board first].
* [skating|fishing|swimming|parking|photography|cycling|camping] is [not allowed|strictly forbidden|permitted
  only in summer] [here|on this side of the lake|beyond the gate|after dark|near the memorial].
* [lost|found]: a [silver earring|gray cat with a white tail|set of keys|child's mitten|black umbrella|leather
  wallet|folding bicycle] near the [station|town hall|duck pond|bus stop|stadium|bakery|river path].
* the [meeting|lecture|tour|rehearsal|auction|blood drive|chess club|flea market] [has been moved to the main
  hall|takes place on {weekday} in room {3..40}|begins one hour later than planned|is open to everyone].
* for sale: [a sturdy oak table|a child's bicycle|an upright piano|a box of old records|a sewing machine|a
  fiberglass canoe|a pair of ski boots], [hardly used|good condition|price to be agreed|buyer must collect].
== stories
he = the fisherman; my grandfather; the young clerk; a lonely king; the night watchman; the old sailor; a
  tired soldier; the miller's son; the shy postman
she = my grandmother; the queen; a young widow; the innkeeper's daughter; the school nurse; the witch; a
  traveling actress; the lighthouse keeper's wife; my eldest sister
* {he} [opened the letter with shaking hands|hid the coins under a stone|walked home through the empty
  streets|heard footsteps behind the door|lit a candle and waited|forgot what he had promised|sold his horse
  to a stranger|dreamed of a burning ship|told the same joke twice], [but nobody noticed|and the storm grew
  louder|although it was late|while the others slept].
* {she} [locked the garden gate|burned the photographs|found a ring inside the fish|planted a tree for every
  child|laughed until she cried|wrote a long letter to the bishop|missed the last train home|pretended not to
  hear|baked a cake without sugar] [the night before the wedding|when the war ended|one winter morning].
* when [the bell rang|the lights went out|the snow melted|the music stopped|dawn came|the king died|the guests
  had gone], [everyone ran to the window|the boy was nowhere to be found|a dog began to howl|we found the
  money gone|the sisters finally spoke|a rider appeared on the hill|there was nothing left to eat].
* years later, {he} [still kept the broken watch|returned to the island|could not remember her name|met his
  brother by chance|built a house on that spot|learned the truth about the fire].
* [nobody believed|everyone knew|the villagers feared|few remembered|the children imagined] that [the mill was
  haunted|the stranger was a prince|the well had no bottom|a giant slept under the hill|the treasure had been
  stolen|the river once ran the other way|the clock told the wrong time].
* we [spent the summer|grew up|got married|hid for {few} days|lived without electricity] in [a cottage by a
  lake|a noisy apartment above a bakery|my uncle's barn|a village of forty houses|a converted windmill].
* [after dinner|on the way home|during the long voyage|that evening|at the funeral], {she} [told us about her
  first love|fell asleep in her chair|admitted that she was ill|gave away her jewels|taught me to play chess].
== comparisons
big = an elephant is heavier than a horse; the Nile is longer than the Rhine; a violin is smaller than a
  cello; silk is smoother than wool; a cheetah can outrun a lion; honey is sweeter than milk; a mile is longer
  than a kilometer; winter nights are longer than summer nights; granite is harder than chalk; a trumpet is
  louder than a flute; lemons are more sour than oranges; gold is more expensive than silver; a feather falls
  more slowly than a stone; a whale is not a fish but a mammal; spinach contains more iron than lettuce; a
  marathon is twice as long as a half marathon; a snail is slower than a tortoise; lead is denser than cork;
  an ocean is deeper than a lake; a cathedral is larger than a chapel; a novel is longer than a short story;
  crows are cleverer than pigeons; a blizzard is worse than a light snowfall; a leap year has one more day
  than an ordinary year; a spider has more legs than a beetle; rubber stretches more easily than leather
* {big}.
* [my brother|our new teacher|the taller twin|her boss|the second candidate|your uncle] is [more patient|less
  punctual|funnier|far more ambitious|even lazier] than [I am|the last one|his father|people say|we imagined].
* [the countryside is more pleasant than the city|a written letter means more than an email|the morning shift
  passes faster than the late one|silver jewelry suits her more than gold chains|taking the stairs is
  healthier than riding the elevator], [at least for me|or so I used to think|but tastes differ].
* {country} [exports more|imports less|produces far more|consumes less]
  [rice|coal|steel|wine|coffee|cotton|timber|butter|natural gas] than {country}.
== school
* [the teacher|a substitute teacher|the headmistress|our physics tutor|the music instructor] [wrote a formula
  on the board|handed back the essays|asked for silence|explained the rules again|praised the slowest
  pupil|collected the phones|caught two boys cheating|canceled the excursion] [before the bell|on
  {weekday}|without a word|because the class was noisy].
* students are [taking notes in a lecture hall|dissecting a frog|throwing their caps in the air|building a
  robot|reading aloud in a circle|protesting against higher fees|queuing for the cafeteria|rehearsing a play].
* [the essay|my thesis|the group project|the lab report|the homework|the application] is due [on {weekday}|in
  {few} weeks|by the end of {month}|before midnight], but [I have not started|half the data is missing|nobody
  agrees on a title|the printer is broken|the library is closed].
* {15..85} percent of [graduates|apprentices|former students] in {country} [cannot swim|find work within a
  year|read for pleasure|failed the mathematics test|speak a foreign language].
* [|{ask} ]how do you [memorize vocabulary|choose a research topic|write a strong conclusion|cite a newspaper
  article|deal with a boring professor|prepare for an oral exam|stay awake in class|take better notes]?
== work
* [my manager|a coworker|the new intern|our receptionist|the night guard|the accountant] [takes credit for my
  ideas|arrives late every day|asked for a raise|hums all day long|quit without notice|never answers
  emails|was promoted|accidentally deleted the report], and [I do not know what to say|everyone is talking
  about it|the boss seems not to care|it is hard to concentrate].
* [|{ask} ]how should I [dress for an interview|ask for a raise|explain a gap in my resume|resign politely|say
  no to overtime|address a letter to a stranger|deal with a rude customer|negotiate a salary]?
* [a woman|a man|an office worker|a secretary|an engineer] is [giving a long presentation|signing a
  contract|yawning in a meeting|looking at blueprints|shaking hands with a client|stacking folders|shouting
  into a megaphone|drawing a chart on a whiteboard|watering the office plant][| {calm}].
* the [factory|warehouse|farm|hotel|shipyard|call center|hospital] [employs {110..950} people|is looking for
  cleaners|pays the minimum wage|offers free lunches|stopped hiring in {month}|does not recognize the union].
* [miners|pilots|nurses|bus drivers|fishermen|judges|firefighters|translators] [earn more|work longer
  hours|retire earlier|take greater risks|need more training] than [most people realize|they did {12..50}
  years ago|their colleagues abroad|the public thinks].
* I would rather [be my own boss|commute by train|share an office|work four long days|teach small children]
  than [sit in meetings|earn more money|drive for two hours|stay at home all week|answer phones].
== photography and art
* [|{ask} ]what [lens|tripod|shutter speed|filter|film|flash] [would you use|do I need|is best|should a
  beginner try] for [portraits|night skies|birds in flight|waterfalls|indoor sports|a wedding|street scenes]?
* [my pictures|the portraits|half of the negatives|these scans] are [blurred|too dark|overexposed|full of dust
  spots|oddly green], even though [I used a tripod|the light was good|the camera is new|I followed the guide].
* an artist is [sketching a portrait|carving a block of ice|painting a sunset|molding clay on a wheel|blowing
  glass|spraying paint on a wall|arranging pebbles in a spiral|gilding a picture frame] [at a fair|in her
  studio|while tourists watch|with great care].
* the [film|novel|play|musical|comic book|series] [is set in wartime {city}|was better than the sequel|bored
  me to tears|won {few} awards|has a terrible ending|opened to mixed reviews|was banned in {country}].
* an [actress|author|opera singer|architect|art dealer] [received a lifetime award|donated a collection|died
  at the age of {61..99}|gave a rare interview|is writing a memoir|unveiled a plan for a museum] in {city}.
== language and writing
* [|{ask} ]is it correct to [begin a sentence with a conjunction|end with a preposition|use a comma before
  "and"|capitalize the seasons|write numbers as words|drop the article in a title|split an infinitive] [in
  formal writing|in a letter|in British English|in a headline]?
* [German|Finnish|Arabic|Japanese|Hungarian|Russian|Mandarin|Swahili] has [more cases than|fewer vowels than|a
  simpler grammar than|almost nothing in common with] [Dutch|Spanish|Korean|Turkish|Hindi|Greek|Danish].
* [my editor|a reviewer|the publisher|my writing group] [rejected the manuscript|thinks the dialogue is
  stiff|wants a happier ending|found two plot holes|asked me to cut {few} chapters|likes the villain most],
  but [I disagree|I am grateful|the deadline is near|the title stays].
* how can I make [a villain|a narrator|a dull hero|a talking animal|a minor character|an immortal]
  [believable|funny without being silly|more sympathetic|sound different from the others|frightening] in [a
  short story|a first novel|a fantasy series|a radio play]?
== beach and water
* [a woman in a red swimsuit|a lifeguard|a bald man|a teenager|a snorkeler|an old couple|a shirtless man]
  [wades into the sea|floats on an inflatable mattress|collects shells|reads under a parasol|rinses sand
  off|looks at the waves|eats a melting ice cream] [at low tide|on a crowded beach|near the pier|at sunset].
* [a waterfall|a lighthouse|a wooden pier|a rusty shipwreck|a row of beach huts|a rocky island|a coral reef]
  [in the mist|under a clear sky|at high tide|seen from the air|against a red sunset].
* people are [paddling a canoe|rafting down a river|diving from a cliff|water skiing|pulling a net
  ashore|sailing around a buoy|swimming across a lake|feeding gulls from a deck|jumping off a jetty] {scene}.
* a man [catches a pike|baits a hook|cleans a fish|casts a line|rows a dinghy|mends a net|empties a crab trap]
  [before sunrise|beside his son|in a drizzle|on a quiet morning].
* the [sea|bay|lagoon|water] was [too cold for swimming|full of jellyfish|calm as a mirror|brown after the
  storm|deeper than it looked|covered with algae] [in {month}|when we arrived|off the pier|all week].
== indoors
* a [living room|kitchen|bedroom|hallway|study|dining room|basement] with [a leather armchair|a tiled floor|a
  piano in the corner|shelves full of books|a low ceiling|a chandelier|peeling paint|two large windows].
* [a man|a woman|a teenager|an old man|a guest|a roommate] is [ironing a shirt|vacuuming the carpet|folding
  towels|knitting a scarf|lighting a candle|brushing teeth|reading a newspaper on the sofa|washing
  dishes|sewing a button|solving a crossword|watching television in bed|arranging flowers|setting the
  table|mopping the floor|shaving at the mirror|opening a parcel|wrapping a gift][| {calm}].
* there [is no milk|are crumbs everywhere|is a spider in the bath|are {few} chairs missing|is a strange
  smell|are moths in the wardrobe|is a draft under the door], and [nobody wants to deal with it|the guests are
  already here|no one has noticed|the shop closes soon].
* [the clock|a mirror|an oil lamp|a calendar|a coat|a stuffed owl|a string of garlic] [hangs on|fell off|was
  removed from|casts a shadow on] the [bedroom|kitchen|hallway|classroom|workshop] wall.
* [|{ask} ]how do I get [red wine|candle wax|ink|grass stains|chewing gum|coffee|mildew|pet hair] out of a
  [wool carpet|white shirt|leather sofa|cotton dress|mattress|silk tie]?
* [the sheets|his socks|the curtains|her gloves|the towels] were [drying on the line|folded in a drawer|two
  sizes too small|full of holes|damp and cold|left at the laundry].
== clothes and appearance
* a [tall|young|smiling|tattooed|gray-haired|sunburned|slim] [man|woman|person|stranger] wearing [a straw
  hat|a {color} jacket|sunglasses|a silk scarf|a wool sweater|a feathered mask|torn jeans|rubber gloves|a
  backpack|a kilt] [looks at the camera|leans on a railing|holds a sign|waves from a balcony|points at the
  sky|carries a suitcase|sits on a wall][| {scene}].
* [a bride|a groom|a bridesmaid|a model|a ballerina|a clown|a knight in armor|a magician] [poses for a
  picture|adjusts a belt|smiles at the crowd|walks down the steps|waits for the elevator].
* a [woman|girl|man|boy] is [putting on lipstick|trying on shoes|having a haircut|combing tangled
  hair|buttoning a coat|dyeing a shirt|looking in a mirror|blowing on cold hands|removing a wig][| {calm}].
* [to be honest|in my opinion|if you ask me], this [dress|suit|jacket|raincoat|wedding gown] [does not fit|is
  too formal|goes well with pearls|was a bargain|needs a new zipper|makes me look older].
* the [crowd|audience|whole hall|front row] [applauds|laughs|falls silent|grows impatient|stands up|whispers]
  as [the curtain rises|the speaker trips|the lights dim|the doors open|the priest enters|the result is read].
== hiking and outdoors
* [hikers|campers|soldiers|boy scouts|two climbers|a guide and her mule] are [crossing a rope bridge|resting
  on a summit|gathering firewood|pitching a tent|following a muddy trail|studying a map|wading through a
  river|roasting marshmallows|descending a cliff|sheltering under a rock][| {scene}].
* [a green valley|a narrow canyon|a field of lavender|a dense forest|a frozen lake|a desert road|a terraced
  hillside|a deep crater] [under dark clouds|at dawn|with a village in the distance|seen through morning fog].
* [|{ask} ][how heavy should a backpack be|what food keeps well|how do you stay warm|what boots are best|how
  do you treat water] [on a winter climb|above the tree line|on a week-long walk|in wet weather]?
* we [lost the path|ran out of water|saw an eagle's nest|slept under the stars|reached the hut|met no one] [on
  the third day|after climbing for {2..11} hours|just before nightfall].
* a [man|woman|hiker|farmer|ranger] is [riding a mule|picking mushrooms|lighting a campfire|crossing a stream
  on stones|looking through binoculars|filling a canteen|cycling through a forest|carrying a lamb][| {scene}].
== farming and food trade
* [farmers|growers|ranchers|smallholders] in {country} [blame|worry about|are divided over|protest against] [a
  new pesticide|wolves|cheap imports|the lack of rain|a ban on burning stubble|genetically modified seeds].
* [wheat|rice|cocoa|olive|potato|grape|sugar|tea] harvest in {country} [hits record|falls short|threatened by
  drought|delayed by rain|hurt by pests|expected to recover]
* a [farmer|boy|milkmaid|woman with a bucket|hired hand] is [milking a cow|feeding hens|plowing a
  field|shearing a sheep|loading hay onto a wagon|picking cotton|driving geese to market|threshing
  barley|mending a fence|grooming a horse][| {scene}].
* [supermarkets|inspectors|producers|a dairy] [recalled|withdrew|destroyed] [{3..90} tons of beef|baby
  formula|frozen berries|canned tuna|eggs|peanut butter] after [glass was found in a package|tests showed
  bacteria|a labeling error|several people fell ill][|{said}].
* [organic apples|rye rolls|goat cheeses|local strawberries|frozen peas] [cost more than|taste better than|are
  not necessarily healthier than|keep longer than] [ordinary ones|the imported kind|what most shops sell].
* the [mill|barn|vineyard|orchard|stable|greenhouse|silo] [was built in 18{10..99}|burned down in
  {month}|belongs to {few} brothers|is open to visitors|stands empty|was hit by lightning].
== energy and environment
* [a solar farm|a nuclear reactor|a gas pipeline|a hydroelectric dam|a coal plant] [will supply {20..900},000
  homes|was shut down|divides the residents|is years behind schedule|has been approved] in {country}[|{said}].
* [the ice cap|the rain forest|the coral reef|the wetland|the glacier|the dune coast] is [shrinking|in
  danger|recovering slowly|being studied by satellite], [a report says|local groups claim|new pictures show].
* [carbon emissions|plastic waste|air pollution|water use|deforestation] in {country} [fell|rose|doubled]
  [last year|after the new law|between 19{70..98} and 20{10..20}|as the economy slowed][|{said}].
* [bees|salmon|sparrows|tigers|eels|sea turtles|vultures|amphibians] are [disappearing from|coming back
  to|protected by law in|illegally hunted in|no longer found in] [much of Europe|{country}|the river delta|the
  southern plains|our valley].
* should we [tax meat|ban diesel cars|build more nuclear plants|pay for every plastic bag|plant trees in
  deserts|stop flying short distances], or [is that unfair|would it change nothing|are there better ideas]?
== history and places
* [the castle|the old town hall|the abbey|the city wall|the harbor] was
  [built|destroyed|rebuilt|besieged|sold|abandoned] in the [eleventh|thirteenth|seventeenth|nineteenth]
  century [after a great fire|by order of the king|during a civil war|when trade moved south].
* the [treaty|revolution|plague|great famine|naval battle|coronation] of 1{5..8}{10..99} [changed the map of
  Europe|is hardly mentioned in textbooks|cost thousands of lives|made the merchants rich].
* [the Romans|the Vikings|medieval monks|the ancient Egyptians|early settlers|the Phoenicians] [did not know
  potatoes|brewed beer|traded amber and salt|studied the stars|buried food with the dead|feared the open sea].
* {city} is [farther north than|larger than|older than|more expensive than|not as crowded as|sunnier than]
  [most people believe|other cities of its size|any town on the coast].
* [|{ask} ][which river flows through|how many people live in|when was the university founded in|why do
  tourists love|who designed the opera house in|what language is mostly spoken in] {city}?
* a [statue of a general|stone bridge|ruined temple|domed mosque|marble fountain|row of wooden houses|clock
  tower|war cemetery] in {city} [attracts thousands of visitors|is being restored|was photographed at
  night|dates from the Middle Ages].
* [workers|a farmer|students|treasure hunters] found [a Roman mosaic|a hoard of silver coins|a stone altar|an
  unexploded bomb|a mass grave|a clay tablet] [in {country}|near the ruins|by accident|last {month}][|{said}].
== technology and media
* [regulators|lawmakers|privacy groups|teachers' unions] in {country} want [social networks|search
  engines|online shops|streaming services] to [delete old data|check the age of users|pay for news|label fake
  images|explain their rankings|limit advertising].
* [a robot|a computer program|artificial intelligence|a cheap machine] [can now|could soon|still cannot]
  [translate a conversation|deliver medicine|detect cancer early|pick ripe fruit|write a decent poem|recognize
  sarcasm|beat experts at poker].
* [a newspaper|a magazine|a news website|a tabloid] [apologized for|lost readers over|was sued over|defended]
  [a false report|leaked diaries|photos of the princess|an insulting cartoon|a secret recording].
* the new [phone|tablet|game console|camera] [has a brighter screen|sells for ${2..9}99|is thinner than the
  old one|was delayed until {month}|overheats|cannot be repaired|sold out within hours].
== opinions
* I [do not think|believe|doubt|am not sure|would argue] that [homework helps children|money brings
  happiness|the death penalty prevents crime|art must be beautiful|children need religion|lying is always
  wrong|robots will take our jobs|boxing should be a sport|museums ought to be free|borders make us safer].
* it is [rude|not polite|perfectly fine|a bad habit] to [correct someone's grammar|whistle in church|leave a
  party early|ask a person's age|eat with your hands|refuse a gift|stare at strangers|jump a queue|call after
  ten at night|bring a baby to a concert].
* [nobody would agree|not everyone believes|almost everybody thinks|only a fool would say|hardly any expert
  accepts] that [taxes are too low|the earth is flat|luck matters more than talent|war can be just|tigers make
  good pets|silence is golden|the old days were better].
* [a good friend|a fair judge|a wise leader|a decent neighbor|a real artist|an honest salesman] [keeps a
  secret|does not boast|admits mistakes|tells you the truth|never stops learning|helps without being asked].
== family and social life
* [my wife|my husband|her mother|his cousin|our neighbor|a friend of mine] [forgot our anniversary|wants to
  move to {city}|joined a choir|refuses to fly|bought a sheep|collects old radios|snores like a bear|has
  invited {12..60} guests], and [I find it funny|we are delighted|nobody knows why|I am not happy about it].
* what should I [bring to a dinner party|write on a wedding card|give a friend who has everything|say to a
  grieving colleague|wear to a christening|cook for a vegetarian guest|do when a guest will not leave]?
* [two old friends|newlyweds|some neighbors|three generations of women|a few nuns] [share a bench|toast with
  champagne|play cards by the window|look through a photo album|hug at the airport|pose in front of a
  monument|argue over a map|sing in a kitchen|walk arm in arm].
* my [teenager|flatmate|stepson|little sister] [never cleans up|plays loud music|eats only pasta|lied to
  me|stays out late]; [is this normal|how do I stay calm|has anyone else had this|what would you do]?
* [the wedding|his birthday|our reunion|the christening|the farewell party] was [held in a barn|attended by
  {30..200} people|a complete disaster|quieter than planned|called off|interrupted by a power cut].
== daily numbers
* it takes [{2..11} hours to reach {city} by train|{15..55} minutes to charge the car|less than a day to paint
  a fence|almost a week to recover from the flu|{few} days to knit a hat|{15..55} minutes to climb the tower|a
  whole night to defrost a turkey|{2..9} weeks to read that book].
* there are {20..800} [seats in the theater|islands in the lake|students in the course|steps in the tower|cows
  on the farm|pages in the novel|rooms in the palace|beds in the hospital], [not counting the new ones|if I
  remember correctly|roughly speaking|according to the sign].
* a [liter of milk|ride on the tram|night in the hostel|haircut|loaf of rye bread|cinema ticket|dozen oysters]
  costs [about ${3..19}|twice as much as last year|less in {country}|more on weekends|almost nothing here].
* the [package|letter|refund|invitation|replacement part|medal] [arrived|was sent|came] [{2..12} days late|on
  {weekday}|to the wrong address|in {month}|after two reminders].
* [the next bus|the ferry to the island|the night train|the last tram|our coach] [leaves|departs] [at
  {2..11}:{10..55}|in half an hour|before sunrise|{10..50} minutes late].
"""

Lists = dict[str, list[str]]


def parse(grammar: str) -> list[tuple[str, Lists]]:
    """Return every template with the word lists it may use."""
    templates: list[tuple[str, Lists]] = []
    shared: Lists = {}
    lists = shared
    for line in re.sub(r"\n +", " ", grammar).strip().splitlines():
        if line.startswith("== "):
            lists = shared if line == "== shared" else dict(shared)
        elif line.startswith("* "):
            templates.append((line[2:], lists))
        else:
            name, entries = line.split(" = ", 1)
            lists[name] = entries.split("; ")
    return templates


class Expander:
    """Fills templates in, dealing the options of each slot like cards so that all come up equally often."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed).random  # only random(): its values never change between versions
        self.decks: dict[tuple[str, ...], list[str]] = {}

    def deal(self, options: list[str]) -> str:
        """Take the next card of the deck made of ``options``; shuffle a new deck when it is used up."""
        deck = self.decks.setdefault(tuple(options), [])
        if not deck:
            keyed = sorted((self.random(), i) for i in range(len(options)))
            deck.extend(options[i] for _, i in keyed)
        return deck.pop()

    def fill(self, slot: str, lists: Lists) -> str:
        """Fill one ``{slot}``: a number range or the name of a list."""
        low, dots, high = slot.partition("..")
        if dots:
            return str(int(low) + int(self.random() * (int(high) - int(low) + 1)))
        return self.deal(lists[slot])

    def expand(self, template: str, lists: Lists) -> str:
        """Return one sentence: slots filled in from the inside out, then articles, spaces and capital."""
        text = template
        while match := SLOT.search(text):
            slot, options = match.groups()
            new = self.fill(slot, lists) if slot else self.deal(options.split("|"))
            text = text[: match.start()] + new + text[match.end() :]
        text = AN.sub(lambda a: a[0][0] + "n ", text.replace(" ,", ","))
        return text[0].upper() + text[1:]


def sentences(seed: int = 0) -> list[str]:
    """Return ``COUNT`` distinct sentences in random order, the same ones for the same seed."""
    expander = Expander(seed)
    pool: list[tuple[str, Lists, list[set[str]]]] = [(*template, []) for template in parse(GRAMMAR)]
    found: dict[str, None] = {}
    for _ in range(8 * PER_TEMPLATE):  # rounds over all templates, one try each
        for template, lists, earlier in pool:
            text = expander.expand(template, lists)
            words = set(re.findall(r"\w+", text.lower()))
            close = any(len(words & other) > OVERLAP * len(words | other) for other in earlier)
            if text in found or close or len(earlier) >= PER_TEMPLATE or not 5 <= len(text.split()) <= 25:
                continue
            found[text] = None
            earlier.append(words)
            if len(found) == COUNT:
                return [text for _, text in sorted((expander.random(), text) for text in found)]
    raise RuntimeError(f"the grammar gave only {len(found)} sentences, not {COUNT}")


def main(argv: list[str] | None = None) -> None:
    """Write the sentences to a file, one a line."""
    parser = argparse.ArgumentParser(description="Write the quick-start sentences, one a line.")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (default: %(default)s)")
    output = parser.parse_args(argv).output
    output.write_text("\n".join(sentences()) + "\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
